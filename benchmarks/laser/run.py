"""LASER on a model: balance and loss on held-out text, alone and with a joint plan, and what it costs in time.

    python benchmarks/laser/run.py [MODEL] [--windows 8] [--bound 0.005]

MODEL is a directory or `demo`. Calibration and held-out text are the bundled samples (disjoint documents). A batch is
`--windows` windows of 256 tokens of one domain; LIS is of a batch and layer, its mean over both is the figure (slots
instead of experts where there is a plan; the denominator stays). `all` is the LIS of the whole text's counts. The loss
increase is relative to the untouched model on the same windows, with one standard error over windows.

    untouched
    laser            thresholds calibrated to `--bound`
    laser, any       the same, where a token's strongest expert may be given up too
    joint            a joint plan at budget 1.0, from the same calibration text
    joint + laser    LASER calibrated on the balanced model, to what the plan left of the bound

Time: prefill of one batch and single decoding steps, in turn with and without LASER; medians of the ratios.
The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import equipoise as eq
from equipoise.cli import console
from equipoise.demo import calibration_text, heldout_text
from equipoise.evaluation.data import Batch, batches, windows
from equipoise.evaluation.perplexity import TextResult, evaluate_text
from equipoise.files.text import read_texts
from equipoise.models import find_layers, load_model
from equipoise.pipeline.text import thin
from equipoise.rerouting import Rule, Thresholds, calibrate, installed
from equipoise.rerouting.calibration import loss_increase


@dataclass(frozen=True)
class Outcome:
    """What was measured of one variant."""

    lis: float
    lis_all: float
    text: TextResult
    moved: float


def by_domain(loaded: Any, path: Path, per: int, seq_len: int) -> list[Batch]:
    """Batches of one domain each, `per` windows spread over its text."""
    cut = windows(loaded.tokenizer, read_texts([path]), seq_len)
    out: list[Batch] = []
    for domain in dict.fromkeys(window.domain for window in cut):
        members = thin([w for w in cut if w.domain == domain], seq_len, max_tokens=seq_len * per)
        out += batches(members, per, loaded.model.config)
    return out


def measure(model: Any, items: Sequence[Batch], thresholds: Thresholds | None) -> Outcome:
    experts = find_layers(model)[0].num_experts
    each, results, total = [], [], None
    with installed(model, thresholds) if thresholds else contextlib.nullcontext() as routing:
        for batch in items:
            with eq.watch(model) as load:
                results.append(evaluate_text(model, [batch]))
            counts = load.slot_counts
            each.append(np.mean([float(eq.slot_lis(n, experts)) for n in counts]))
            total = counts if total is None else [a + b for a, b in zip(total, counts, strict=True)]
    text = TextResult(
        np.concatenate([r.nll for r in results]),
        np.concatenate([r.tokens for r in results]),
        tuple(d for r in results for d in r.domains),
    )
    whole = float(np.mean([float(eq.slot_lis(n, experts)) for n in total or []]))
    moved = float(routing.rerouted.sum() / routing.tokens.sum()) if routing else 0.0
    return Outcome(float(np.mean(each)), whole, text, moved)


@torch.no_grad()
def cost(model: Any, batch: Batch, thresholds: Thresholds, pairs: int) -> dict[str, float]:
    """Time with LASER over time without, of a prefill and of a decoding step."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def seconds(steps: int) -> float:
        if steps == 0:
            begin = time.perf_counter()
            model(**inputs, use_cache=False)
            return time.perf_counter() - begin
        cache = model(**{k: v[:1, :32] for k, v in inputs.items()}, use_cache=True).past_key_values
        begin = time.perf_counter()
        for step in range(steps):
            model(input_ids=inputs["input_ids"][:1, 32 + step : 33 + step], past_key_values=cache, use_cache=True)
        return time.perf_counter() - begin

    ratios: dict[str, list[float]] = {"prefill": [], "decode": []}
    for name, steps in (("prefill", 0), ("decode", 8)):
        for pair in range(pairs + 1):
            plain = seconds(steps)
            with installed(model, thresholds):
                routed = seconds(steps)
            if pair:  # the first is a warm-up
                ratios[name].append(routed / plain)
    return {name: statistics.median(values) for name, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--windows", type=int, default=8, help="of a domain, and rows of a batch")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--bound", type=float, default=0.005, help="of the relative increase of the loss")
    parser.add_argument("--pairs", type=int, default=7, help="timings; 0: none")
    parser.add_argument("--no-any", action="store_true", help="leave out the variant `laser, any`")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaded = load_model(arguments.model)
    model = loaded.model
    seen, held = (
        by_domain(loaded, text, arguments.windows, arguments.seq_len) for text in (calibration_text(), heldout_text())
    )
    rows: dict[str, Outcome] = {"untouched": measure(model, held, None)}
    calibrated: dict[str, float] = {}
    base = rows["untouched"]

    def laser(name: str, bound: float, strongest: bool) -> Thresholds:
        console.note(f"{name}: calibrating to {bound:.3%}")
        found = calibrate(model, seen, max_loss_increase=bound, keep_strongest=strongest)
        calibrated[name] = found.increase
        rows[name] = measure(model, held, found.thresholds)
        console.note(f"{name}: LIS {rows[name].lis:.3f}, loss {loss_increase(base.text, rows[name].text)[0]:+.3%}")
        return found.thresholds

    times: dict[str, float] = {}
    thresholds = laser("laser", arguments.bound, True)
    if arguments.pairs:
        times = cost(model, held[0], thresholds, arguments.pairs)
    if not arguments.no_any:
        laser("laser, any", arguments.bound, False)
    plan = eq.plan(eq.profile(model, seen), budget=1.0)
    in_sample = evaluate_text(model, seen)
    eq.apply(model, plan)
    # What the plan costs is measured on the calibration text too: the rest of the bound is LASER's.
    left = max(0.0, arguments.bound - loss_increase(in_sample, evaluate_text(model, seen))[0])
    rows["joint"] = measure(model, held, Thresholds.of(model, Rule()))
    console.note(f"joint: LIS {rows['joint'].lis:.3f}, {left:.3%} of the bound left")
    laser("joint + laser", min(left, arguments.bound), True)

    table, result = [], {}
    for name, row in rows.items():
        increase, error = loss_increase(base.text, row.text)
        result[name] = {
            "lis": row.lis,
            "lis_change": row.lis / base.lis - 1,
            "lis_all": row.lis_all,
            "loss_increase": increase,
            "loss_error": error,
            "moved": row.moved,
            "loss_increase_in_sample": calibrated.get(name),
        }
        table.append(
            (
                name,
                f"{row.lis:.3f}",
                f"{row.lis / base.lis - 1:+.1%}",
                f"{row.lis_all:.3f}",
                f"{increase:+.3%}",
                f"{error:.3%}",
                f"{row.moved:.1%}",
            )
        )
    tokens = int(base.text.tokens.sum())
    console.table(
        f"LASER on {arguments.model}: held-out text, {tokens:,} tokens, batches of {arguments.windows} windows",
        ("", "LIS", "change", "LIS all", "loss", "+-", "tokens moved"),
        table,
    )
    if times:
        console.table("time with LASER / without", tuple(times), [[f"{ratio:.3f}" for ratio in times.values()]])
    console.last_line(
        {
            "model": arguments.model,
            "tokens": tokens,
            "bound": arguments.bound,
            "rows": result,
            "time": times,
            "threads": arguments.threads,
            "processor": platform.processor(),
        }
    )


if __name__ == "__main__":
    main()
