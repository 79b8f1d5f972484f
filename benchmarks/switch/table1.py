"""R&Q's Table 1 on the small Switch Transformers: fine-tuning strategies against no fine-tuning at all and R&Q.

    python benchmarks/switch/table1.py --work DIR [--data ../shared/data] [--quick] [--experts 8] --json FILE

Rows a model: Original, the eight strategies, R&Q on the original and on the fully fine-tuned model. LIS is the mean
over the four sparse layers on the test pairs (for R&Q the maximum runs over slots); F1 is in points. Changes are
against the Original of the same model, with 95 % intervals: of F1 a paired t interval over questions, of LIS a paired
bootstrap over windows of eight pairs. Everything is kept in the work directory, so a second run takes seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import artifact
import balanced
import finetune
import numpy as np
import strategies
import task
import text
import torch
from build import original
from model import EXPERTS

from equipoise.errors import InputError
from equipoise.evaluation.perplexity import half_width
from equipoise.files.atomic import atomic_file
from equipoise.metrics import slot_lis
from equipoise.types import FloatArray, IntArray

DATA = Path("../shared/data")
DRAWS = 2000
BALANCED = {"R&Q": "Original", f"{finetune.KEPT} + R&Q": finetune.KEPT}
"""Rows made by R&Q, and what it was applied to."""


def layer_lis(found: finetune.Measured, experts: int, weights: IntArray | None = None) -> FloatArray:
    """LIS of each layer: over slots where there is a plan, else over experts.

    Args:
        found: W windows of L layers.
        experts: E.
        weights: int64 [draws, W], how often each window counts; None: once.

    Returns:
        float64 [draws, L], or [L] without weights.
    """
    if weights is None:
        return layer_lis(found, experts, np.ones((1, len(found.load)), dtype=np.int64))[0]
    return np.stack([slot_lis(weights @ slots, experts) for slots in found.slots], axis=1)


def lis_interval(before: finetune.Measured, after: finetune.Measured, experts: int) -> tuple[float, float]:
    """95 % interval of the change of the mean LIS: paired bootstrap over windows, percentiles."""
    n = len(before.load)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=DRAWS)
    changes = (layer_lis(after, experts, weights) - layer_lis(before, experts, weights)).mean(1)
    low, high = np.percentile(changes, [2.5, 97.5])
    return float(low), float(high)


def measured(
    path: Path, found: finetune.Task, tokenizer: Any, options: finetune.Options, work: Path
) -> dict[str, finetune.Measured]:
    """Every row of one model, by name, in the order of the table; what R&Q is compared with is made first."""

    def kept(what: str, make: Callable[[], finetune.Measured]) -> finetune.Measured:
        return finetune.cached(work, f"{path.stem}-{what}-{finetune.key(path, found, options, what)}", make)

    def on_full() -> finetune.Measured:
        model = finetune.fully_fine_tuned(path, found, tokenizer, options, work)
        return balanced.balance(model, found, tokenizer)

    first = kept("original", lambda: finetune.measure(original(path)[0], found, tokenizer))
    alone = kept("rq", lambda: balanced.balance(original(path)[0], found, tokenizer))
    last = kept("rq-on-full", on_full)
    tuned = {how.name: finetune.fine_tuned(path, how, found, tokenizer, options, work) for how in strategies.STRATEGIES}
    return {"Original": first, **tuned, "R&Q": alone, f"{finetune.KEPT} + R&Q": last}


def rows_of(experts: int, results: dict[str, finetune.Measured]) -> list[dict[str, Any]]:
    """Rows of one model as plain values: LIS, F1 in points, changes against `Original` and R&Q's own base."""
    base = results["Original"]
    out = []
    for name, found in results.items():
        layers = layer_lis(found, experts)
        row: dict[str, Any] = {
            "experts": experts, "name": name, "lis": float(layers.mean()), "lis_layers": layers.round(4).tolist(),
            "f1": 100 * float(found.f1.mean()), "questions": len(found.f1), **found.about,
            "answers_empty": sum(not answer for answer in found.answers),
        }  # fmt: skip
        if name != "Original":
            row |= _change(base, found, experts, "")
        if name in BALANCED:
            row |= _change(results[BALANCED[name]], found, experts, "_base")
        out.append(row)
    return out


def _change(before: finetune.Measured, after: finetune.Measured, experts: int, suffix: str) -> dict[str, Any]:
    """Change of both measures with intervals."""
    delta = 100 * (after.f1 - before.f1)
    half = half_width(delta)
    lis_change = float((layer_lis(after, experts) - layer_lis(before, experts)).mean())
    return {
        f"f1_change{suffix}": float(delta.mean()),
        f"f1_ci95{suffix}": [float(delta.mean()) - half, float(delta.mean()) + half],
        f"lis_change{suffix}": lis_change,
        f"lis_ci95{suffix}": list(lis_interval(before, after, experts)),
    }


def rows(work: Path, quick: bool, data: Path = DATA, models: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """The rows of the models (None: both, the smaller one alone when quick), made or read back from `work`.

    Raises:
        InputError: data or artifacts are missing.
    """
    options = finetune.QUICK if quick else finetune.Options()
    found, tokenizer = finetune.read_task(data, options), text.load_tokenizer()
    out = []
    for experts in models or (EXPERTS[:1] if quick else EXPERTS):
        out += rows_of(experts, measured(artifact.path_of(experts), found, tokenizer, options, work))
    return out


def table(found: list[dict[str, Any]]) -> str:
    """The rows as a markdown table."""
    lines = [
        "| experts | strategy | LIS | change of LIS | F1, points | change of F1 |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for row in found:
        changes = ["", ""]
        if "f1_change" in row:
            changes = [_interval(row["lis_change"], row["lis_ci95"], 3), _interval(row["f1_change"], row["f1_ci95"], 2)]
        lines.append(
            f"| {row['experts']} | {row['name']} | {row['lis']:.3f} | {changes[0]} | {row['f1']:.2f} | {changes[1]} |"
        )
    return "\n".join(lines)


def _interval(value: float, ends: list[float], digits: int) -> str:
    return f"{value:+.{digits}f} [{ends[0]:+.{digits}f}, {ends[1]:+.{digits}f}]"


def notes(found: list[dict[str, Any]], data: Path, quick: bool) -> list[str]:
    """What a reader of the table must know, with F1 that needs no model."""
    options = finetune.QUICK if quick else finetune.Options()
    work = finetune.read_task(data, options)
    known = task.without_a_model(work.train, work.test)
    said = [
        f"WikiQA, question to answer sentence: {len(work.pairs)} training pairs of the dev file's "
        f"{len(task.pairs(work.train))}, {len(work.test)} test "
        f"questions; AdamW {options.lr:g}, weight decay {options.weight_decay:g}, batch {options.batch}, "
        f"{options.epochs} epochs, balancing loss 0.01, one seed.",
        "Answers are greedy without repeating a pair of tokens, at most 56 tokens; references are whole. F1 without a "
        "model: " + ", ".join(f"{name} {100 * value:.2f}" for name, value in known.items()) + ".",
        "LIS is the mean over two encoder and two decoder layers on the test pairs, padding not counted; with R&Q "
        "over slots. Intervals are 95 %, paired, over questions (F1) and windows of eight pairs (LIS); they do not "
        "cover the seed of a fine-tuning run.",
    ]
    for row in found:
        if row["name"] in BALANCED:
            said.append(
                f"{row['experts']} experts, {row['name']} against {BALANCED[row['name']]}: LIS "
                f"{_interval(row['lis_change_base'], row['lis_ci95_base'], 3)}, F1 "
                f"{_interval(row['f1_change_base'], row['f1_ci95_base'], 2)} points, {row['bytes']:.4f} of the "
                f"experts' bytes, precisions {' and '.join(row['precision'])}."
            )
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="holds wikiqa_dev and wikiqa_test")
    parser.add_argument("--work", type=Path, required=True, help="results are kept there")
    parser.add_argument("--json", type=Path, required=True, help="file to write: rows, markdown, notes")
    parser.add_argument("--quick", action="store_true", help="8 experts, 24 pairs, 24 questions, two epochs")
    parser.add_argument(
        "--experts", type=int, choices=EXPERTS, action="append", help="only this model; may be repeated"
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    begin = time.monotonic()
    found = rows(arguments.work, arguments.quick, arguments.data, arguments.experts)
    document = {"rows": found, "markdown": table(found), "notes": notes(found, arguments.data, arguments.quick)}
    with atomic_file(arguments.json) as partial:
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(document["markdown"])
    for line in document["notes"]:
        print(f"- {line}")
    summary = {f"{row['experts']} {row['name']}": [round(row["lis"], 3), round(row["f1"], 2)] for row in found}
    print(json.dumps({"lis_and_f1": summary, "seconds": round(time.monotonic() - begin, 1)}))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
