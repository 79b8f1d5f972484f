"""R&Q's Table 1 on the small Switch Transformers: fine-tuning strategies against no fine-tuning at all and R&Q.

    python benchmarks/switch/table1.py --work DIR [--data ../shared/data] [--quick] [--experts 8] --json FILE
    python benchmarks/switch/table1.py --work DIR --json FILE --jobs 16 [--pairs 0] [--device cuda]

Rows a model: Original, the eight strategies, R&Q on the original and on the fully fine-tuned model. LIS is the mean
over the four sparse layers on the test pairs (for R&Q the maximum runs over slots); F1 is in points. Changes are
against the Original of the same model, with 95 % intervals: of F1 a paired t interval over questions, of LIS a paired
bootstrap over windows of eight pairs. Everything is kept in the work directory, so a second run takes seconds.

With `--jobs N` rows are made by N processes at a time (this script with `--row NAME`), one thread each. When some fail,
each is named on a line of its own, what the others made is kept, and the exit code is 1; run again for the rest.
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
import devices
import finetune
import jobs
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


ON_FULL = f"{finetune.KEPT} + R&Q"
ROWS = ("Original", *(how.name for how in strategies.STRATEGIES), "R&Q", ON_FULL)
"""Rows of a model, in the order of the table."""
BALANCED = {"R&Q": "Original", ON_FULL: finetune.KEPT}
"""Rows made by R&Q, and what it was applied to."""


def measured(
    path: Path, found: finetune.Task, tokenizer: Any, options: finetune.Options, work: Path, only: Sequence[str] = ROWS
) -> dict[str, finetune.Measured]:
    """Rows of one model by name, in the order of the table; made when they are not in the work directory."""

    def kept(what: str, make: Callable[[], finetune.Measured]) -> finetune.Measured:
        return finetune.cached(work, f"{path.stem}-{what}-{finetune.key(path, found, options, what)}", make)

    def on_full() -> finetune.Measured:
        model = finetune.fully_fine_tuned(path, found, tokenizer, options, work)
        return balanced.balance(model, found, tokenizer)

    def start() -> Any:
        return original(path)[0].to(options.device)

    def row(name: str) -> finetune.Measured:
        if name == "Original":
            return kept("original", lambda: finetune.measure(start(), found, tokenizer))
        if name == "R&Q":
            return kept("rq", lambda: balanced.balance(start(), found, tokenizer))
        if name == ON_FULL:
            return kept("rq-on-full", on_full)
        return finetune.fine_tuned(path, strategies.strategy(name), found, tokenizer, options, work)

    return {name: row(name) for name in ROWS if name in only}


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


def rows(work: Path, options: finetune.Options, data: Path, models: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of the models by their numbers of experts, made or read back from `work`.

    Raises:
        InputError: data or artifacts are missing.
    """
    found, tokenizer = finetune.read_task(data, options), text.load_tokenizer()
    out = []
    for experts in models:
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


def commands(arguments: argparse.Namespace, models: Sequence[int]) -> dict[str, list[str]]:
    """A command for each row, the longest first; R&Q on the fully fine-tuned model waits for it, so both are one."""
    shared = [sys.executable, __file__, "--data", str(arguments.data), "--work", str(arguments.work)]
    shared += ["--device", arguments.device, "--threads", str(arguments.threads)]
    shared += ["--quick"] if arguments.quick else []
    shared += [] if arguments.pairs is None else ["--pairs", str(arguments.pairs)]
    out = {}
    order = [*(how.name for how in strategies.STRATEGIES), "R&Q", "Original"]
    for name in order:
        for experts in sorted(models, reverse=True):
            asked = [name, ON_FULL] if name == finetune.KEPT else [name]
            chosen = [part for row in asked for part in ("--row", row)]
            out[f"{experts} experts, {' and '.join(asked)}"] = [*shared, "--experts", str(experts), *chosen]
    return out


def notes(found: list[dict[str, Any]], data: Path, options: finetune.Options) -> list[str]:
    """What a reader of the table must know, with F1 that needs no model."""
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
    parser.add_argument("--json", type=Path, help="file to write: rows, markdown, notes")
    parser.add_argument("--quick", action="store_true", help="8 experts, 24 pairs, 24 questions, two epochs")
    parser.add_argument(
        "--experts", type=int, choices=EXPERTS, action="append", help="only this model; may be repeated"
    )
    parser.add_argument("--row", action="append", choices=ROWS, help="make only this row and stop; may be repeated")
    parser.add_argument("--pairs", type=int, help="training pairs at most, 0 for all (default: 64, quick 24)")
    parser.add_argument("--device", choices=devices.NAMES, default=finetune.Options.device)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, each with --threads threads")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        raise InputError(f"--jobs {arguments.jobs}: give 1 or more")
    if arguments.json is None and not arguments.row:
        raise InputError("give --json FILE for the table, or --row NAME to make a row without it")
    torch.set_num_threads(arguments.threads)
    begin = time.monotonic()
    options = finetune.options_of(arguments.quick, arguments.pairs, arguments.device)
    models = arguments.experts or (EXPERTS[:1] if arguments.quick else EXPERTS)
    if arguments.row:
        work, tokenizer = finetune.read_task(arguments.data, options), text.load_tokenizer()
        for experts in models:
            measured(artifact.path_of(experts), work, tokenizer, options, arguments.work, arguments.row)
        print(json.dumps({"rows": arguments.row, "seconds": round(time.monotonic() - begin, 1)}))
        return
    if arguments.jobs > 1:
        failed = jobs.run(commands(arguments, models), arguments.jobs, arguments.threads)
        for line in failed:
            print(f"error: {line}", file=sys.stderr)
        if failed:
            sys.exit(1)
    found = rows(arguments.work, options, arguments.data, models)
    document = {"rows": found, "markdown": table(found), "notes": notes(found, arguments.data, options)}
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
