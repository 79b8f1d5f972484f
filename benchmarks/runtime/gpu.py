"""Blocks and a whole model on a GPU, against transformers' implementations on the same weights; tables and one JSON.

    python benchmarks/runtime/gpu.py --out benchmarks/runtime/results        (about 90 s, most of it warming up)
    python benchmarks/runtime/gpu.py --device cpu --shapes tiny --layers 2 --hidden 64 --seconds 30   (to try it)

What `blocks.py` and `whole.py` measure, in one process, with weights drawn on the device. In addition:

    bf16_triton     original slots by the Triton kernels too (EQUIPOISE_CUDA_KERNELS=triton_all)
    int8_torch      no Triton: `_int_mm` slot by slot, with one read-back a layer (EQUIPOISE_CUDA_KERNELS=torch)
    graph           the same works captured in a CUDA graph and replayed: what is left when launches cost nothing
    laser, watch    paired with and without, prefill and decoding

One unit of a block is 8 routings one after the other, so that few tokens do not find the same few experts in the
second-level cache; every call ends with a synchronisation. `timing.py` says how ratios are taken. After --seconds no
further part is begun, and what was left out is named. With --out, gpu.json is written after each part and gpu.md at
the end. The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from blocks import COPIED, SHAPES, Shape, errors, one_layer, routing, variants
from gpu_report import document
from model import Sizes, random_model, text_batches
from plans import all_low, balanced, plan_of_slots, quarter_low, twin
from timing import Pace, Work, compare, race, script, seconds, warm
from whole import DECODE, DEFAULT, TRANSFORMERS, Decoder, decode_times, prefill, summary

import equipoise as eq
from equipoise.cli import console
from equipoise.demo import model_dir
from equipoise.errors import InputError
from equipoise.files.atomic import atomic_file
from equipoise.models.loading import LoadedModel, find_source, load_tokenizer
from equipoise.pipeline.versions import made_with
from equipoise.rerouting import Rule, Thresholds, installed
from equipoise.runtime.kernels.grouped import VARIABLE, choice

PACE = Pace(seconds=0.3, least=5, most=15, warm_seconds=0.2)
ROUTINGS = 8
PREFILLS = {"prefill_1x512": (1, 512), "prefill_4x512": (4, 512)}
GRAPHED = ("batched_mm", "grouped_mm", "bf16", "bf16_triton", "int8_25", "int8", "int8_weight_only")
KERNELS = {"bf16_triton": ("bf16", "triton_all"), "int8_torch": ("int8", "torch")}
"""Variants that are another's slots with other kernels."""


@contextmanager
def kernels(name: str | None) -> Iterator[None]:
    """Ask for kernels (see `equipoise.runtime.kernels.grouped`) inside the block; None: leave the choice as it is."""
    before = os.environ.get(VARIABLE)
    if name is not None:
        os.environ[VARIABLE] = name
    try:
        yield
    finally:
        if name is not None:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before


def synced(work: Work, device: torch.device) -> Work:
    """`work`, and a synchronisation when it is on a GPU."""

    def call() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


class Run:
    """What was found so far, where it is kept, and how much time is left."""

    def __init__(self, device: torch.device, limit: float, out: Path | None) -> None:
        self.device, self.limit, self.out = device, limit, out
        self.begin = time.perf_counter()
        self.found: dict[str, Any] = {"device": device_name(device), "blocks": {}, "left_out": [], **made_with()}
        self.found["kernels"] = choice(device)[0]

    def may(self, what: str) -> bool:
        """Whether there is time for another part; one that there is none for is noted."""
        if time.perf_counter() - self.begin < self.limit:
            return True
        self.found["left_out"].append(what)
        console.note(f"{what} is LEFT OUT: {self.limit:g} s are over")
        return False

    def keep(self) -> None:
        """Write what there is: a crash later takes nothing away."""
        self.found["seconds"] = time.perf_counter() - self.begin
        if self.out is not None:
            with atomic_file(self.out / "gpu.json") as path:
                path.write_text(json.dumps(console.plain(self.found), indent=1), encoding="utf-8")


def device_name(device: torch.device) -> str:
    """As the driver names it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def block(run: Run, name: str, shape: Shape, rows: list[int]) -> None:
    """All variants of one shape at each T, then as graphs."""
    model = one_layer(shape, run.device)
    modules = dict(variants(shape, model))
    del modules["no_plan"]  # transformers' own implementation
    found: dict[str, Any] = {"errors": errors(shape, model, modules), "times": {}, "graph": {}, "graph_failed": {}}
    run.found["blocks"][name] = found
    for count in rows:
        if not run.may(f"block {name}, T = {count}"):
            continue
        inputs = [tuple(x.to(run.device) for x in routing(shape, count, seed)) for seed in range(1, ROUTINGS + 1)]

        def work_of(key: str, inputs: Any = inputs) -> Work:
            base, wanted = KERNELS.get(key, (key, None))

            def call() -> None:
                with kernels(wanted):
                    for arguments in inputs:
                        modules[base](*arguments)

            return call

        names = [*modules, *(KERNELS if run.found["kernels"] != "torch" else {})]
        if count * shape.top_k * shape.expert_bytes > COPIED:
            names.remove("batched_mm")
        works = {key: synced(work_of(key), run.device) for key in names}
        for work in works.values():
            warm(work, PACE)
        found["times"][str(count)] = compare(race(works, PACE), [key for key in TRANSFORMERS if key in works])
        note(f"{name} T = {count}", found["times"][str(count)])
        run.keep()
        if run.device.type == "cuda" and run.may(f"block {name}, T = {count}, graphs"):
            graphs = capture({key: work_of(key) for key in names if key in GRAPHED}, found["graph_failed"])
            replays = {key: synced(graph.replay, run.device) for key, graph in graphs.items()}
            if baselines := [key for key in TRANSFORMERS if key in replays]:
                for replay in replays.values():
                    warm(replay, PACE)
                found["graph"][str(count)] = compare(race(replays, PACE), baselines)
                note(f"{name} T = {count}, graphs", found["graph"][str(count)])
            del graphs, replays
            run.keep()


def capture(works: dict[str, Work], failed: dict[str, str]) -> dict[str, torch.cuda.CUDAGraph]:
    """Each (warm) work as a CUDA graph; those that cannot be captured are named with the reason."""
    graphs = {}
    for key, work in works.items():
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        try:
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):  # not `torch.cuda.graph`, which collects garbage for a quarter of a second
                graph.capture_begin()
                try:
                    work()
                finally:
                    graph.capture_end()
            graphs[key] = graph
        except RuntimeError as error:
            failed[key] = str(error).splitlines()[0]
            torch.cuda.synchronize()
    return graphs


def whole(run: Run, sizes: Sizes) -> None:
    """Prefill and decoding of a model, and what `watch` and LASER add."""
    source = find_source(model_dir())
    tokenizer = load_tokenizer(source)
    loaded = LoadedModel(source, random_model(sizes, len(tokenizer), run.device), tokenizer)
    with eq.watch(loaded.model) as load:
        for batch in on_device(loaded, 4, 256, 2, run.device):
            loaded.model(**batch, use_cache=False)
    models = {name: twin(loaded.model) for name in TRANSFORMERS}
    for name, model in models.items():
        model.set_experts_implementation(name)
    counts = load.counts
    plans = {
        "int8_25": plan_of_slots(loaded.model, lambda row, _: quarter_low(counts[row].tolist())),
        "int8": plan_of_slots(loaded.model, lambda *_: all_low(sizes.experts)),
        "int8_weight_only": plan_of_slots(loaded.model, lambda *_: all_low(sizes.experts, "int8_weight_only")),
    }
    models |= {name: balanced(loaded.model, plan) for name, plan in plans.items()}
    found: dict[str, Any] = {"lis": eq.lis(counts).mean(), "times": {}, "watch": {}, "laser": {}}
    found["bytes"] = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    run.found["whole"] = found
    for name, (rows, length) in PREFILLS.items():
        if run.may(name):
            (batch,) = on_device(loaded, rows, length, 1, run.device)
            works = {key: synced(prefill(model, batch), run.device) for key, model in models.items()
                     if key != "batched_mm"}  # fmt: skip
            for work in works.values():
                warm(work, PACE)
            found["times"][name] = summary(race(works, PACE), rows * length)
            note(name, found["times"][name])
            run.keep()
    for name, rows in DECODE.items():
        if run.may(name):
            (batch,) = on_device(loaded, rows, 96, 1, run.device)
            found["times"][name] = summary(decode_times(models, batch["input_ids"], 2), rows * 4)
            note(name, found["times"][name])
            run.keep()
    rules = {"watch": None, "laser_kept": Rule(), "laser": Rule(gap=0.1)}
    for key in (DEFAULT, "int8_25"):
        for name, rule in rules.items():
            if run.may(f"{name} of {key}"):
                found["watch" if rule is None else "laser"][f"{name} {key}"] = added(run, loaded, models[key], rule)
                run.keep()


def on_device(loaded: LoadedModel, rows: int, length: int, count: int, device: torch.device) -> list[dict[str, Any]]:
    """Batches of the bundled text."""
    return [{k: v.to(device) for k, v in b.items()} for b in text_batches(loaded, rows, length, count)]


def added(run: Run, loaded: LoadedModel, model: Any, rule: Rule | None, pairs: int = 7) -> dict[str, dict[str, float]]:
    """What `watch`, or LASER with one rule in every layer, adds to a prefill of 512 tokens and to decoding."""

    def inside() -> AbstractContextManager[Any]:
        return eq.watch(model) if rule is None else installed(model, Thresholds.of(model, rule))

    (long,) = on_device(loaded, 1, 512, 1, run.device)
    (short,) = on_device(loaded, 8, 96, 1, run.device)
    decoder = Decoder(model, short["input_ids"], model)
    return {
        "prefill_1x512": paired(inside, synced(prefill(model, long), run.device), pairs),
        "decode_8": paired(inside, synced(decoder, run.device), pairs, decoder.rewind),
    }


def paired(
    inside: Callable[[], AbstractContextManager[Any]],
    work: Work,
    pairs: int,
    again: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Time of `work` inside a context over that outside, less 1; entering the context is not counted."""
    ratios = []
    for pair in range(pairs + 1):
        sides = {}
        for with_it in (False, True) if pair % 2 else (True, False):
            with inside() if with_it else nullcontext():
                again()
                work()  # what a context brings to the device at its first forward is no cost of a forward
                again()
                sides[with_it] = seconds(work)
        if pair:  # the first is a warm-up
            ratios.append(sides[True] / sides[False] - 1)
    return {"cost": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "pairs": pairs}


def note(what: str, rows: dict[str, Any]) -> None:
    """One line of progress."""
    console.note(f"{what}: " + ", ".join(f"{key} {row['ratio']:.2f} ({row['ms']:.2f} ms)" for key, row in rows.items()))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", default="e64,e8,demo", help="of blocks, the first before the model; empty: none")
    parser.add_argument("--rows", default="1,8,64,512", help="T of blocks")
    parser.add_argument("--layers", type=int, default=8, help="of the model; 0: no model")
    parser.add_argument("--hidden", type=int, default=1024, help="of the model; intermediate is half of it")
    parser.add_argument("--seconds", type=float, default=85.0, help="after which no further part is begun")
    parser.add_argument("--out", type=Path, help="directory for gpu.json and gpu.md")
    arguments = parser.parse_args()
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("torch finds no CUDA device here; --device cpu tries the script")
    names = [name for name in arguments.shapes.split(",") if name]
    if wrong := set(names) - set(SHAPES):
        raise InputError(f"--shapes: {', '.join(sorted(wrong))} is not one of {', '.join(SHAPES)}")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    run = Run(device, arguments.seconds, arguments.out)
    console.note(f"{run.found['device']}, kernels: {run.found['kernels']}")
    rows = [int(t) for t in arguments.rows.split(",")]

    def blocks(some: list[str]) -> None:
        for name in some:
            if run.may(f"block {name}"):
                block(run, name, SHAPES[name], rows)

    blocks(names[:1])
    if arguments.layers and run.may("whole model"):
        whole(run, Sizes(hidden=arguments.hidden, intermediate=arguments.hidden // 2, layers=arguments.layers))
    blocks(names[1:])
    run.keep()
    text = document(console.plain(run.found))
    console.note(text)
    if arguments.out:
        with atomic_file(arguments.out / "gpu.md") as path:
            path.write_text(text, encoding="utf-8")
    console.last_line(run.found)


if __name__ == "__main__":
    script(main)
