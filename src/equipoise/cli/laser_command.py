"""`equipoise laser`: calibrate LASER's thresholds for a model and measure them on held-out text."""

from __future__ import annotations

import time
from pathlib import Path

import click

from equipoise.cli import console
from equipoise.errors import InputError
from equipoise.options import EvalOptions

_DEFAULTS = EvalOptions()


@click.command(name="laser")
@click.argument("model", default="demo")
@click.option("--data", multiple=True, type=click.Path(path_type=Path), help="Calibration text: .jsonl(.gz) or .txt.")
@click.option(
    "--heldout", multiple=True, type=click.Path(path_type=Path), help="Text to measure on; without it half of --data."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Thresholds to write (.json).")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option(
    "--max-loss-increase", type=float, default=0.005, show_default=True, help="Bound on calibration text, relative."
)
@click.option(
    "--any",
    "give_up",
    is_flag=True,
    help="Tokens may give up their strongest expert too; keeping it bounds the balance.",
)
@click.option("--seq-len", type=int, default=_DEFAULTS.seq_len, show_default=True, help="Tokens a window of text.")
@click.option("--batch-size", type=int, default=_DEFAULTS.batch_size, show_default=True, help="Windows a forward pass.")
@click.option("--max-tokens", type=int, default=16384, show_default=True, help="At most about so many of each part.")
def command(
    model: str,
    data: tuple[Path, ...],
    heldout: tuple[Path, ...],
    out: Path,
    force: bool,
    max_loss_increase: float,
    give_up: bool,
    seq_len: int,
    batch_size: int,
    max_tokens: int,
) -> None:
    """Calibrate routing by score distribution and load (LASER) for MODEL, balanced or not, and measure it.

    Written beside a checkpoint as laser.json, the thresholds are what `eq.laser(model)` takes by itself.

    \b
    Examples:
      equipoise laser demo --out laser.json
      equipoise laser run/model --data calibration.jsonl --heldout other.jsonl --out run/model/laser.json
    """
    began = time.monotonic()
    options = EvalOptions(seq_len=seq_len, batch_size=batch_size)
    from equipoise.demo import calibration_text, heldout_text
    from equipoise.evaluation.data import batches
    from equipoise.evaluation.perplexity import evaluate_text
    from equipoise.files import require_destination
    from equipoise.metrics import slot_lis
    from equipoise.models.loading import DEMO, load_model
    from equipoise.pipeline.text import split_text, thin
    from equipoise.profiling import watch
    from equipoise.rerouting import calibrate, installed, save_laser
    from equipoise.rerouting.calibration import loss_increase

    require_destination(out, force, [*data, *heldout])
    if not data:
        if model != DEMO:
            raise InputError("no calibration text: give --data FILE (.jsonl, .jsonl.gz with a text field, or .txt)")
        data, heldout = (calibration_text(),), heldout or (heldout_text(),)
    loaded = load_model(model)
    network = loaded.model
    split = split_text(loaded.tokenizer, data, heldout, seq_len=options.seq_len, share=0.5)
    seen, held = (
        batches(thin(part, seq_len, max_tokens=max_tokens), options.batch_size, network.config)
        for part in (split.calibration, split.heldout)
    )
    with console.progress() as track:
        found = calibrate(network, seen, max_loss_increase=max_loss_increase, keep_strongest=not give_up, track=track)
        with watch(network) as raw:
            before = evaluate_text(network, held, track)
        with installed(network, found.thresholds) as routing, watch(network) as load:
            after = evaluate_text(network, held, track)
    save_laser(found.thresholds, out)
    experts = found.thresholds.num_experts
    score = [[float(slot_lis(n, experts)) for n in part.slot_counts] for part in (raw, load)]
    increase, error = loss_increase(before, after)
    console.table(
        f"LASER on {model}, held-out text ({int(before.tokens.sum()):,} tokens; LIS: 1 is perfect balance)",
        ("layer", "gap", "mass", "target", "LIS", "with LASER"),
        [
            (layer, f"{rule.gap:.3f}", f"{rule.mass:.3f}", f"{rule.target:.2f}", f"{a:.3f}", f"{b:.3f}")
            if not rule.keeps
            else (layer, "-", "-", "-", f"{a:.3f}", f"{b:.3f}")
            for layer, rule, a, b in zip(found.thresholds.layers, found.thresholds.rules, *score, strict=True)
        ],
    )
    means = [sum(part) / len(part) for part in score]
    console.note(
        f"loss {increase:+.3%} +- {error:.3%} (bound {max_loss_increase:.3%}, calibration {found.increase:+.3%})"
    )
    console.last_line(
        {
            "out": str(out),
            "model": model,
            "lis_before": means[0],
            "lis": means[1],
            "loss_increase": increase,
            "loss_error": error,
            "loss_increase_in_sample": found.increase,
            "max_loss_increase": max_loss_increase,
            "moved": float(routing.rerouted.sum() / max(1, routing.tokens.sum())),
            "layers_fixed": list(routing.fixed),
            "seconds": time.monotonic() - began,
        }
    )
