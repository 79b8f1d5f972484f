"""LASER on a model: balance and loss on held-out text, alone and with a joint plan.

    python benchmarks/laser/run.py [MODEL] [--windows 8] [--bound 0.005]

MODEL is a directory or `demo`. Calibration and held-out text are the bundled samples (disjoint documents). A batch is
`--windows` windows of 256 tokens of one domain; LIS is of a batch and layer, its mean over both is the figure (slots
instead of experts where there is a plan; the denominator stays). `all` is the LIS of the whole text's counts. The loss
increase is relative to the untouched model on the same windows, with one standard error over windows.

    untouched
    floor            the least that is possible while every token keeps its strongest expert: the busiest expert by
                     first choices alone, on the untouched model's scores (of no meaning for a top-1 model)
    laser            thresholds calibrated to `--bound`; a token's strongest expert is always kept
    laser, any       the same, where it may be given up too
    joint            a joint plan at budget 1.0, from the same calibration text
    joint + laser    LASER calibrated on the balanced model, to what the plan left of the bound

What LASER costs in time is `cost.py`. The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
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
from equipoise.rerouting.install import LayerRouting
from equipoise.rerouting.prices import count
from equipoise.rerouting.selection import Decision


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


class FirstChoices(LayerRouting):
    """Leaves the routing as it is; counts how often each expert is a token's strongest."""

    def choose(
        self, scores: torch.Tensor, index: torch.Tensor, before: torch.Tensor, real: torch.Tensor | None, logits: bool
    ) -> Decision | None:
        """The family's choice."""
        first = index.gather(1, scores.gather(1, index).argmax(-1, keepdim=True))
        load = count(first, scores.shape[1], real)
        tokens = len(index) if real is None else int(real.sum())
        even = tokens * index.shape[1] / self.layer.num_experts
        self.least = max(1.0, float(load.max()) / even)
        return super().choose(scores, index, before, real, logits)


def floor(model: Any, items: Sequence[Batch]) -> float:
    """Mean LIS over batches and layers below which no routing gets that keeps each token's strongest expert."""
    each = []
    with torch.inference_mode(), installed(model, Thresholds.of(model, Rule()), routing=FirstChoices) as routing:
        for batch in items:
            model(**{name: tensor for name, tensor in batch.items() if name != "labels"}, use_cache=False)
            each.append(np.mean([layer.least for layer in routing.layers]))
    return float(np.mean(each))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--windows", type=int, default=8, help="of a domain, and rows of a batch")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--bound", type=float, default=0.005, help="of the relative increase of the loss")
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

    least = floor(model, held)
    console.note(
        f"untouched: LIS {base.lis:.3f}; with the strongest kept not below {least:.3f} ({least / base.lis - 1:+.1%})"
    )
    laser("laser", arguments.bound, True)
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
    console.note(f"floor with the strongest kept: {least:.3f} ({least / base.lis - 1:+.1%})")
    console.last_line(
        {
            "model": arguments.model,
            "tokens": tokens,
            "bound": arguments.bound,
            "rows": result,
            "floor": least,
            "floor_change": least / base.lis - 1,
            "threads": arguments.threads,
        }
    )


if __name__ == "__main__":
    main()
