"""Run by `test_checkpoint_memory` in a fresh process: peak memory of `apply_checkpoint` above the imported package.

    python checkpoint_memory.py MODEL PLAN OUT

Prints one JSON object: bytes of growth, of the largest shard, of one layer's experts, and of the whole model.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

from equipoise.checkpoint import apply_checkpoint
from equipoise.checkpoint.source import StoredWeights
from equipoise.files import load_plan
from equipoise.models.families import find_layers
from equipoise.models.loading import empty_model, find_source
from equipoise.runtime.sizes import slot_bytes


def resident() -> int:
    """Bytes in memory now, file-backed pages included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """The most that was ever in memory. Not ru_maxrss, which starts with the peak of the process that started it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def main(model: str, plan_file: str, out: str) -> None:
    torch.set_num_threads(1)
    source = find_source(model)
    layers = find_layers(empty_model(source))
    plan = load_plan(Path(plan_file))
    base, before = resident(), peak()
    apply_checkpoint(model, plan, out)
    files = {file: file.stat().st_size for file in StoredWeights(source).files.values()}
    print(
        json.dumps(
            {
                "growth": peak() - base,
                "earlier_peak": before - base,
                "shard": max(files.values()),
                "shards": len(files),
                "layer": max(layer.num_experts * slot_bytes(layer.layout, "original") for layer in layers),
                "model": sum(files.values()),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
