"""Time to apply a plan and to load a balanced checkpoint, and the memory that a loaded model keeps.

    OMP_NUM_THREADS=1 python benchmarks/runtime/loading.py --model olmoe [--work DIR]

For the joint plan at budget 1.0 and for every expert in int8:

    apply       seconds of `equipoise.apply` on the model in memory
    load        seconds of `from_pretrained`, and of the first forward (512 tokens) after it, in which kernels may still
                pack their weights; against the same of the untouched checkpoint. A fresh process for each load, in turn
                A B C A B C; files are in the page cache. Imports are not counted.
    memory      resident bytes of that process after a malloc_trim, less what it held before loading (it had run the
                untouched demo model and dropped it: libraries are no part of a model); after loading or after the first
                forward, whichever is more; over the plan's bytes plus the bytes of the rest of the model. Pages of
                mapped weight files count as resident, as the system counts them.

The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from model import default_work
from plans import plan_of_slots, twin, unchanged
from timing import script, seconds
from whole import all_int8, joint_plan, model_path

import equipoise as eq
from equipoise.cli import console
from equipoise.models import find_layers, load_model
from equipoise.models.loading import LoadedModel
from equipoise.types import Plan

FRESH = """
import ctypes, gc, json, sys, time
import torch
import equipoise
from equipoise.models.loading import find_source, auto_class

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {kind: int(lines[kind].split()[0]) * 1024 for kind in ("VmRSS", "RssAnon", "RssFile")}

torch.set_num_threads(int(sys.argv[2]))
source = find_source(sys.argv[1])
kind = auto_class(source.config)
kind._model_mapping[type(source.config)]  # imports the model's code
ids = torch.arange(512)[None] % 1000 + 3
with torch.no_grad():
    # Libraries and caches that any first forward brings into a process belong to no model.
    other = find_source("demo")
    model = auto_class(other.config).from_pretrained(other.path).eval()
    model(input_ids=ids, use_cache=False)
    del model
    before = resident()
    begin = time.perf_counter()
    model = kind.from_pretrained(source.path).eval()
    load = time.perf_counter() - begin
    after_load = resident()
    begin = time.perf_counter()
    model(input_ids=ids, use_cache=False)
    first = time.perf_counter() - begin
after = resident()
grown = lambda now: {key: now[key] - before[key] for key in now}
print(json.dumps({"load": load, "first": first, "before": before, "loaded": grown(after_load), "used": grown(after)}))
"""


def fresh_load(path: Path, threads: int) -> dict[str, Any]:
    """Load a checkpoint in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(path), str(threads)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"loading {path} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def rest_bytes(model: Any) -> int:
    """Bytes of everything that is no routed expert, tied weights once."""
    experts = {id(p) for layer in find_layers(model) for p in layer.experts.parameters()}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in experts)


def apply_seconds(loaded: LoadedModel, plan: Plan, repeats: int) -> float:
    """Median seconds of `equipoise.apply` in memory."""
    taken = []
    for _ in range(repeats):
        model = twin(loaded.model)
        taken.append(seconds(partial(eq.apply, model, plan)))
    return statistics.median(taken)


def bench(source: str | Path, work: Path, repeats: int) -> dict[str, Any]:
    """Apply, load and memory of each variant."""
    threads = torch.get_num_threads()
    loaded = load_model(source, device="cpu")
    plans = {"balanced": joint_plan(loaded), "int8": all_int8(loaded.model)}
    rest = rest_bytes(loaded.model)
    untouched = plan_of_slots(loaded.model, lambda _, layer: unchanged(layer.num_experts)).budget.original_bytes
    paths = {"untouched": loaded.source.path}
    wanted = {"untouched": untouched + rest}
    found: dict[str, Any] = {"untouched": {}}
    for name, plan in plans.items():
        found[name] = {"apply_seconds": apply_seconds(loaded, plan, repeats)}
        console.note(f"apply, {name}: {found[name]['apply_seconds']:.1f} s")
        wanted[name] = plan.budget.plan_bytes + rest
    del loaded  # the fresh processes need the memory
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as directory:
        for name, plan in plans.items():
            paths[name] = Path(directory) / name
            eq.apply_checkpoint(source, plan, paths[name])
        loads: dict[str, list[dict[str, Any]]] = {name: [] for name in paths}
        for number in range(repeats + 1):
            for name, path in paths.items():
                one = fresh_load(path, threads)
                if number:  # the first brings the files into the page cache
                    loads[name].append(one)
    for name, several in loads.items():
        row = found[name]
        row["load_seconds"] = statistics.median(one["load"] for one in several)
        row["first_forward_seconds"] = statistics.median(one["first"] for one in several)
        row["bytes"] = wanted[name]
        for when in ("loaded", "used"):
            for kind in ("VmRSS", "RssAnon", "RssFile"):
                row[f"{when}_{kind}"] = statistics.median(one[when][kind] for one in several)
        row["memory_ratio"] = max(row["loaded_VmRSS"], row["used_VmRSS"]) / wanted[name]
        console.note(f"{name}: load {row['load_seconds']:.2f} s, memory {row['memory_ratio']:.3f} of its bytes")
    for name in plans:
        found[name]["load_ratio"] = found[name]["load_seconds"] / found["untouched"]["load_seconds"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, olmoe, or a directory")
    parser.add_argument("--work", type=Path, help=f"for the checkpoints (default: {default_work()})")
    parser.add_argument("--quick", action="store_true", help="one measurement of each instead of three")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    work = arguments.work or default_work()
    found = bench(model_path(arguments.model, arguments.work), work, 1 if arguments.quick else 3)
    console.last_line({"model": arguments.model, "threads": torch.get_num_threads(), "loading": found})


if __name__ == "__main__":
    script(main)
