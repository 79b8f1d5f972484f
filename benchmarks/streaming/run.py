"""How well do replicas follow a stream? LIS and moved slots of each policy on five real streams.

    python benchmarks/streaming/run.py [--traces ../shared/traces] [--others]

Windows of 512 tokens (128 for the short V4-Flash decode trace; the steps of the file where it holds a series),
R = E/4 spare slots a layer. The first window places and is not scored. `ratio` is adaptive's mean LIS over the better
of long and short; `moved` is adaptive's moved bytes over short's (slots of one size). `--others` runs the streams on
which the defaults of the adaptive policy were chosen instead. The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

from others import other_streams

from equipoise.pipeline.versions import made_with
from equipoise.streaming import POLICIES, Replay, Stream, load_stream, replay

LITE = tuple(f"deepseek-v2-lite_esft_{part}_topk.npz" for part in ("intent", "summary", "translation"))
STREAMS: dict[str, tuple[tuple[str, ...], int | None]] = {
    "V2-Lite intent, summary, translation": (LITE, 512),
    "gpt-oss sample requests": (("gpt-oss-20b_topk_sample.npz",), 512),
    "V4-Flash decode": (("deepseek-v4-flash_ds4_decode_topk.npz",), 128),
    "Mixtral MMLU subjects": (("mixtral-8x7b_mmlu_57subjects_series.npz",), None),
    "gpt-oss 11 benchmarks": (("gpt-oss-20b_11benchmarks_summary.npz",), None),
}
"""Name -> files joined, tokens a window."""


def five_streams(traces: Path) -> dict[str, Stream]:
    return {name: load_stream([traces / file for file in files], window) for name, (files, window) in STREAMS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"))
    parser.add_argument("--others", action="store_true", help="the streams the defaults were chosen on")
    arguments = parser.parse_args()
    streams = other_streams(arguments.traces) if arguments.others else five_streams(arguments.traces)
    width = max(map(len, streams))
    print(
        f"{'stream':<{width}} {'steps':>5}"
        + "".join(f"{n:>9}" for n in POLICIES)
        + f"{'ratio':>8}{'moved':>7}{'ms/step':>9}"
    )
    rows = {}
    for name, stream in streams.items():
        result = Replay(POLICIES)
        result.steps.extend(replay(stream.parts, max(1, stream.parts.shape[-1] // 4)))
        begin = time.perf_counter()
        for _ in replay(stream.parts, max(1, stream.parts.shape[-1] // 4), ("adaptive",)):
            pass
        spent = (time.perf_counter() - begin) / len(result.steps) * 1000
        lis, moves = result.lis(), result.moves()
        ratio = lis["adaptive"] / min(lis["long"], lis["short"])
        moved = moves["adaptive"] / max(moves["short"], 1)
        rows[name] = {**result.summary(), "ratio": ratio, "moved": moved, "ms_a_step": spent}
        print(
            f"{name:<{width}} {len(result.steps):>5}"
            + "".join(f"{lis[n]:>9.3f}" for n in POLICIES)
            + f"{ratio:>8.3f}{moved:>7.2f}{spent:>9.1f}",
            flush=True,
        )
    mean = math.exp(sum(math.log(r["ratio"]) for r in rows.values()) / len(rows))
    bars = {
        "ratio at most 1.02 on each": all(r["ratio"] <= 1.02 for r in rows.values()),
        "geometric mean at most 0.97": mean <= 0.97,
        "moved at most half of short": all(r["moved"] <= 0.5 for r in rows.values()),
    }
    print(f"geometric mean of the ratios {mean:.4f}")
    for bar, met in bars.items():
        print(f"{'met    ' if met else 'NOT MET'}  {bar}")
    print(json.dumps({"streams": rows, "geometric_mean": mean, "bars": bars, **made_with()}))


if __name__ == "__main__":
    main()
