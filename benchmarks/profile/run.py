"""What does a profile cost over the plain forward on the same tokens?

    python benchmarks/profile/run.py [MODEL] [--pairs 7] [--threads 2]

Both sides run the same batches through the same base model, in turn (A B A B ...), after a warm-up of each. The
ratio is taken pair by pair and its median is the figure: a slow minute of the machine falls on both sides.
    counts     load only (importance_tokens = 0)
    default    load, and importance on the default number of tokens
MODEL is a directory or `demo`. The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

import equipoise as eq
from equipoise.demo import calibration_text
from equipoise.evaluation.data import batches, windows
from equipoise.files.text import read_texts
from equipoise.models.loading import load_model
from equipoise.options import ProfileOptions
from equipoise.pipeline.versions import made_with


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rows", type=int, default=8, help="windows a batch")
    parser.add_argument("--batches", type=int, default=0, help="at most this many batches (0 = all)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaded = load_model(arguments.model)
    model = loaded.model
    cut = windows(loaded.tokenizer, read_texts([calibration_text()]), arguments.seq_len)
    items = batches(cut, arguments.rows, model.config)[: arguments.batches or None]

    @torch.no_grad()
    def forward() -> None:
        for batch in items:
            model.base_model(**batch, use_cache=False)

    sides: dict[str, Callable[[], object]] = {
        "counts": lambda: eq.profile(model, items, ProfileOptions(importance_tokens=0)),
        "default": lambda: eq.profile(model, items),
    }
    tokens = sum(int(batch["attention_mask"].sum()) for batch in items)
    result: dict[str, object] = {"model": arguments.model, "tokens": tokens, "threads": arguments.threads}
    print(f"{'profile':<10}{'ratio to the forward':>22}{'min':>8}{'max':>8}{'forward s':>12}")
    for name, side in sides.items():
        forward(), side()
        pairs = [(seconds(forward), seconds(side)) for _ in range(arguments.pairs)]
        ratios = sorted(b / a for a, b in pairs)
        median = statistics.median(ratios)
        base = statistics.median(a for a, _ in pairs)
        print(f"{name:<10}{median:>22.3f}{ratios[0]:>8.3f}{ratios[-1]:>8.3f}{base:>12.2f}")
        result[name] = {"ratio": median, "min": ratios[0], "max": ratios[-1], "forward_seconds": base}
    print(json.dumps({**result, "pairs": arguments.pairs, **made_with()}))


if __name__ == "__main__":
    main()
