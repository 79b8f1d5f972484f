"""A whole model on the CPU: untouched, balanced, all int8; and what `watch` costs.

    OMP_NUM_THREADS=1 python benchmarks/runtime/whole.py --model demo
    OMP_NUM_THREADS=1 python benchmarks/runtime/whole.py --model olmoe [--work DIR]

Variants, on the same weights:

    eager, batched_mm, grouped_mm   the untouched model, by transformers (grouped_mm is its default)
    no_plan                         `equipoise.apply` of a plan that changes nothing
    balanced                        the joint plan at budget 1.0, from a profile on the bundled calibration text
    int8, ...                       every expert int8, for each int8 format there is
    no_experts                      experts that give back what they get: what the rest of the model leaves to be gained

Work, on the bundled text:

    prefill_1x512, prefill_4x128    one forward without cache
    decode_1, decode_8              32 tokens after a prompt of 64, batch 1 and 8, text fed token by token; a round is 4
                                    tokens, so that a variant is not always the first after another

`timing.py` says how times and ratios are taken; each variant is compared with transformers' default (`ratio`) and with
the best of its three implementations (`ratio_best`). `watch`: pairs of the same work with and without it, entering and
leaving included; its cost is the median of the pairs' ratios, minus 1.
The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from model import default_work, olmoe_like, text_batches
from plans import LOW, all_low, balanced, plan_of_slots, twin, unchanged
from timing import QUICK, Pace, Work, compare, race, script, seconds, warm

import equipoise as eq
from equipoise.cli import console
from equipoise.models import find_layers, load_model
from equipoise.models.loading import LoadedModel
from equipoise.options import ProfileOptions
from equipoise.types import Plan

TRANSFORMERS = ("eager", "batched_mm", "grouped_mm")
DEFAULT = "grouped_mm"
PROMPT, ANSWER, CHUNK = 64, 32, 4
PREFILL = {"prefill_1x512": (1, 512), "prefill_4x128": (4, 128)}
DECODE = {"decode_1": 1, "decode_8": 8}


def joint_plan(loaded: LoadedModel) -> Plan:
    """The joint plan at budget 1.0 from 4 batches [8, 128] of the bundled calibration text, importance by frequency.

    What `error` would choose to quantize makes no difference to the time, and takes minutes to measure here.
    """
    options = ProfileOptions(importance_tokens=0)
    return eq.plan(eq.profile(loaded.model, text_batches(loaded, 8, 128, 4), options), budget=1.0)


def all_int8(model: Any, precision: str = "int8") -> Plan:
    """Every expert once, in an int8 format."""
    return plan_of_slots(model, lambda _, layer: all_low(layer.num_experts, precision))


def variants(loaded: LoadedModel, plan: Plan) -> dict[str, Any]:
    """Models by name; all share what they have in common."""
    models = {}
    for name in TRANSFORMERS:
        models[name] = twin(loaded.model)
        models[name].set_experts_implementation(name)
    models["no_plan"] = balanced(
        loaded.model, plan_of_slots(loaded.model, lambda _, layer: unchanged(layer.num_experts))
    )
    models["balanced"] = balanced(loaded.model, plan)
    for name in LOW:
        models[name] = balanced(loaded.model, all_int8(loaded.model, name))
    models["no_experts"] = without_experts(loaded.model)
    return models


def without_experts(model: Any) -> Any:
    """A twin whose routed experts cost nothing; its output means nothing."""
    other = twin(model)
    for layer in find_layers(other):
        layer.experts.forward = lambda hidden, *_, **__: hidden
    return other


def prefill(model: Any, batch: dict[str, torch.Tensor]) -> Work:
    """One forward over the batch, without cache."""
    return lambda: model(**batch, use_cache=False)


class Decoder:
    """Decoding with a cache: each call reads the next `CHUNK` tokens of the text."""

    def __init__(self, model: Any, ids: torch.Tensor, reader: Any) -> None:
        """`ids` int64 [B, PROMPT + ANSWER]; `reader` reads the prompt (batched_mm would copy gigabytes for it)."""
        self.model, self.ids = model, ids
        self.cache = reader(input_ids=ids[:, :PROMPT], use_cache=True).past_key_values

    def rewind(self) -> None:
        """Forget the answer. Not part of what is timed."""
        if added := self.cache.get_seq_length() - PROMPT:
            self.cache.crop(-added)

    def __call__(self) -> None:
        """CHUNK tokens, from where the cache ends."""
        at = self.cache.get_seq_length()
        for step in range(at, at + CHUNK):
            self.model(input_ids=self.ids[:, step : step + 1], past_key_values=self.cache, use_cache=True)
        if self.ids.is_cuda:
            torch.cuda.synchronize(self.ids.device)


def decode_times(models: dict[str, Any], ids: torch.Tensor, passes: int) -> dict[str, list[float]]:
    """Seconds of each round of CHUNK tokens, `passes` times over the answer, the models in turn in random order."""
    decoders = {name: Decoder(model, ids, models.get(DEFAULT, model)) for name, model in models.items()}
    names, order = list(models), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(passes + 1):
        for name in names:
            decoders[name].rewind()
        for chunk in range(ANSWER // CHUNK):
            if number == 0 and chunk == 2:
                break  # the first two rounds warm up
            order.shuffle(names)
            for name in names:
                took = seconds(decoders[name])
                if number:
                    times[name].append(took)
    return times


def summary(times: dict[str, list[float]], tokens: int) -> dict[str, dict[str, Any]]:
    """`timing.compare` against the default and against the best of three, and tokens a second."""
    best = compare(times, [name for name in TRANSFORMERS if name in times])
    found = compare(times, [DEFAULT])
    for name, row in found.items():
        row["ratio_best"] = best[name]["ratio"]
        row["tokens_per_second"] = tokens / (row["ms"] / 1000)
    return found


def watch_cost(model: Any, work: Work, pairs: int, again: Callable[[], object] = lambda: None) -> dict[str, float]:
    """Paired ratios of `work` with and without `watch`, as a share of the time without."""

    def watched() -> None:
        with eq.watch(model):
            work()

    ratios = []
    for pair in range(pairs + 1):
        sides: dict[bool, float] = {}
        for with_watch in (False, True) if pair % 2 else (True, False):
            again()
            sides[with_watch] = seconds(watched if with_watch else work)
        if pair:  # the first is a warm-up
            ratios.append(sides[True] / sides[False] - 1)
    return {"cost": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "pairs": pairs}


@torch.no_grad()
def bench(loaded: LoadedModel, quick: bool, parts: list[str]) -> dict[str, Any]:
    """The parts asked for, on one model."""
    pace = QUICK if quick else Pace()
    begin = time.perf_counter()
    plan = joint_plan(loaded)
    console.note(f"profile and plan: {time.perf_counter() - begin:.1f} s")
    models = variants(loaded, plan)
    found: dict[str, Any] = {"times": {}, "watch": {}}
    if "prefill" in parts:
        for name, (rows, length) in list(PREFILL.items())[: 1 if quick else None]:
            (batch,) = text_batches(loaded, rows, length, 1)
            # batched_mm copies the weights of every selection: 512 tokens are no work for it.
            works = {key: prefill(model, batch) for key, model in models.items() if key != "batched_mm"}
            for work in works.values():
                warm(work, pace)
            found["times"][name] = summary(race(works, pace), rows * length)
            found["times"][name]["batched_mm"] = {"skipped": "copies the weights of every selection"}
            note(name, found["times"][name])
    if "decode" in parts:
        for name, rows in DECODE.items():
            (batch,) = text_batches(loaded, rows, PROMPT + ANSWER, 1)
            times = decode_times(models, batch["input_ids"], 1 if quick else 2)
            found["times"][name] = summary(times, rows * CHUNK)
            note(name, found["times"][name])
    if "watch" in parts:
        watched = {key: models[key] for key in ((DEFAULT,) if quick else (DEFAULT, "balanced"))}
        found["watch"] = watch_costs(loaded, watched, 9 if quick else 21)
    return found


def watch_costs(loaded: LoadedModel, models: dict[str, Any], pairs: int) -> dict[str, dict[str, dict[str, float]]]:
    """What `watch` costs a prefill of 512 tokens and decoding at batch 1."""
    (long,), (short,) = text_batches(loaded, 1, 512, 1), text_batches(loaded, 1, PROMPT + ANSWER, 1)
    found = {}
    for key, model in models.items():
        decoder = Decoder(model, short["input_ids"], model)
        found[key] = {
            "prefill_1x512": watch_cost(model, prefill(model, long), pairs),
            "decode_1": watch_cost(model, decoder, pairs, decoder.rewind),
        }
        console.note(f"watch, {key}: " + ", ".join(f"{name} {row['cost']:+.1%}" for name, row in found[key].items()))
    return found


def note(name: str, rows: dict[str, dict[str, Any]]) -> None:
    """One line of progress."""
    console.note(f"{name}: " + ", ".join(f"{k} {v['ratio']:.2f}" for k, v in rows.items() if "ratio" in v))


def model_path(name: str, work: Path | None) -> str | Path:
    """`demo`, `olmoe` (written when it is not there) or a directory."""
    return olmoe_like(work) if name == "olmoe" else name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, olmoe, or a directory")
    parser.add_argument("--work", type=Path, help=f"where the OLMoE-like model is kept (default: {default_work()})")
    parser.add_argument("--parts", default="prefill,decode,watch", help="comma-separated")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    loaded = load_model(model_path(arguments.model, arguments.work), device="cpu")
    found = bench(loaded, arguments.quick, arguments.parts.split(","))
    console.last_line({"model": arguments.model, "threads": torch.get_num_threads(), **found})


if __name__ == "__main__":
    script(main)
