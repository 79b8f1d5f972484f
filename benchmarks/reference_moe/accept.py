"""Is the reference model good enough to measure on? Every bar, with the dense model beside it.

    python benchmarks/reference_moe/accept.py --moe reference-moe --dense dense --data ../shared/data --out DIR

    accuracy     PIQA, HellaSwag, ARC-easy: at most 1.0 point below dense, each, by the task's own accuracy; paired 95 %
                 intervals and the length-normalised accuracy beside it
    perplexity   held-out documents of seven domains: better than dense in five of them
    experts      each expert of some middle layers removed in turn (its router logit at minus infinity): loss of the
                 held-out windows, paired; bar: the interval lies above 0 for most. In float32: any change at all
                 of a bfloat16 forward moves the loss of a window by more than a single expert does
    routing      LIS by domain; bar: the heavy hitter differs between domains in most layers

Each part is kept in DIR as soon as it is measured, under a name with the hash of what it was measured on, and is read
from there the next time. The last stdout line is one JSON object. Both directories come from build.py.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import data
import numpy as np
import torch
from ablation import removal_losses
from acceptance import accuracies, perplexities, removals, routing, show, verdict
from answers import accuracy

import equipoise as eq
from equipoise.errors import InputError
from equipoise.evaluation.data import Batch
from equipoise.evaluation.perplexity import evaluate_text
from equipoise.files.atomic import atomic_file
from equipoise.models.loading import load_model

TASKS = ("piqa", "hellaswag", "arc_easy")
LENGTH = 256
PARTS = ("accuracy", "text", "removal")


def held_out(tokenizer: Any, directory: Path, windows: int) -> list[Batch]:
    """One batch of `windows` windows for each domain, from documents that training never saw."""
    out = []
    for domain in data.DOMAINS:
        ids = torch.from_numpy(
            data.held_out_windows(data.tokenized(directory, tokenizer, domain, True), LENGTH, windows)
        )
        out.append(Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, (domain,) * len(ids)))
    return out


def scored(model: Any, batches: Sequence[Batch]) -> dict[str, Any]:
    """Loss of each window, and selections [domains, L, E] where there are experts to select."""
    counts, losses = [], []
    for batch in batches:
        if hasattr(model.config, "num_local_experts"):
            with eq.watch(model) as load:
                losses.append(evaluate_text(model, small(batch)))
            counts.append(np.asarray(load.counts).tolist())
        else:
            losses.append(evaluate_text(model, small(batch)))
    return {
        "nll": np.concatenate([result.nll for result in losses]).tolist(),
        "tokens": np.concatenate([result.tokens for result in losses]).tolist(),
        "domains": [name for result in losses for name in result.domains],
        "counts": counts,
    }


def small(batch: Batch, rows: int = 8) -> list[Batch]:
    """The same windows, a few at a time."""
    return [
        Batch({k: v[n : n + rows] for k, v in batch.items()}, batch.domains[n : n + rows])
        for n in range(0, len(batch.domains), rows)
    ]


def kept(directory: Path, name: str, key: str, measure: Callable[[], Any]) -> Any:
    """A measurement, read from `directory` when it was made on the same things before."""
    path = directory / f"{name}-{key}.json"
    if not path.exists():
        print(f"measures {name}", file=sys.stderr, flush=True)
        value = measure()
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(value))
    return json.loads(path.read_text())


def fingerprint(model: Path, *settings: object) -> str:
    """Twelve digits for a model's weights and the settings of a measurement."""
    digest = hashlib.sha256(repr(settings).encode())
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest() if sys.version_info >= (3, 11)
                          else hashlib.sha256(stream.read()).digest())  # fmt: skip
    return digest.hexdigest()[:12]


def measured(side: str, path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked for of one model (`side`: dense or moe), each measurement kept in `arguments.out`."""
    loaded = load_model(path, dtype=arguments.dtype, device=arguments.device)

    def keep(name: str, measure: Callable[[], Any], *settings: object) -> Any:
        computed = () if arguments.dtype == "auto" else (arguments.dtype,)
        return kept(arguments.out, name, fingerprint(path, *settings, *computed), measure)

    def text() -> dict[str, Any]:
        return scored(loaded.model, held_out(loaded.tokenizer, arguments.data, arguments.windows))

    def removal(layer: int) -> dict[str, Any]:
        batches = held_out(loaded.tokenizer, arguments.data, arguments.removal_windows)
        return removal_losses(load_model(path, dtype="float32", device=arguments.device).model, batches, layer)

    def answers(task: str) -> dict[str, list[float]]:
        found = accuracy(loaded, [task], arguments.data, arguments.items, arguments.rows)
        return {name: measure.values.tolist() for name, measure in found[task].items()}

    half: dict[str, Any] = {}
    if "accuracy" in arguments.only:
        half["accuracy"] = {t: keep(f"{side}-{t}", functools.partial(answers, t), arguments.items) for t in TASKS}
    if "text" in arguments.only:
        half["text"] = keep(f"{side}-text", text, arguments.windows)
    if "removal" in arguments.only and side == "moe":
        half["removal"] = {
            str(n): keep(f"removal32-{n}", functools.partial(removal, n), arguments.removal_windows)
            for n in arguments.layers
        }
    return half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moe", type=Path, help="the reference model (without it: only the dense model's half)")
    parser.add_argument("--dense", type=Path, required=True, help="build.py --dense-out")
    parser.add_argument("--data", type=Path, required=True, help="directory of the text and task files")
    parser.add_argument("--out", type=Path, required=True, help="keeps each measurement, and accepted.json")
    parser.add_argument("--items", type=int, default=1000, help="first items of a task (0 = all)")
    parser.add_argument("--windows", type=int, default=24, help="held-out windows a domain")
    parser.add_argument("--removal-windows", type=int, default=4, help="the same, for the removal of experts")
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 20], help="layers whose experts are removed")
    parser.add_argument("--rows", type=int, default=16, help="questions a forward pass")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("auto", "float32"), default="auto",
                        help="to compute in; float32 is many times faster than bfloat16 on AVX2")  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="measure these and stop there")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    halves = {
        side: measured(side, path, arguments)
        for side, path in (("dense", arguments.dense), ("moe", arguments.moe))
        if path is not None
    }
    if arguments.moe is None or set(arguments.only) < set(PARTS):
        print(json.dumps({"measured": {side: sorted(half) for side, half in halves.items()}}))
        return
    dense, moe = halves["dense"], halves["moe"]
    result: dict[str, Any] = {
        "accuracy": accuracies(dense["accuracy"], moe["accuracy"]),
        "perplexity": perplexities(dense["text"], moe["text"]),
        "experts": removals(moe["removal"]),
        "routing": routing(moe["text"]["counts"]),
    }
    result["bars"] = verdict(result)
    result["accepted"] = all(result["bars"].values())
    show(result)
    with atomic_file(arguments.out / "accepted.json") as partial:
        partial.write_text(json.dumps(result, indent=1))
    print(json.dumps({"accepted": result["accepted"], "bars": result["bars"], "out": str(arguments.out)}))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
