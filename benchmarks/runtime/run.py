"""Runtime: blocks, whole models, loading and memory, each in a process of its own; tables, bars, one JSON line.

    python benchmarks/runtime/run.py --quick
    python benchmarks/runtime/run.py --out benchmarks/runtime/results
    python benchmarks/runtime/run.py --parts blocks --shapes e64,e8 --threads 1     (a turn of its own for a part)

`--quick`: one thread, shapes demo and e64, shorter rounds, loading of the demo model only. The machine should do
nothing else. `blocks.py`, `whole.py` and `loading.py` say what is measured and can be run alone.
With --out, results.json and blocks.png are written there. The last stdout line is one JSON object: `bars`, the ratios
of blocks by shape, threads, T and variant, of models by work and variant, `watch`, loading, memory, the processor.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from blocks import SHAPES, available
from model import default_work, olmoe_like
from report import bar_table, bars, block_tables, draw_blocks, loading_tables, processor, whole_tables
from timing import script

from equipoise.cli import console
from equipoise.errors import InputError
from equipoise.files.atomic import atomic_file
from equipoise.pipeline.versions import made_with

HERE = Path(__file__).parent
PARTS = ("blocks", "whole", "loading")
MODELS = ("demo", "olmoe")


def part(name: str, arguments: list[str], threads: int) -> dict[str, Any]:
    """Run one script of this folder and read its last line."""
    console.note(f"{name}.py {' '.join(arguments)}, {threads} thread(s)")
    begin = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / f"{name}.py"), *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why on stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"seconds": time.perf_counter() - begin}


def chosen(what: str, given: str, choices: tuple[str, ...]) -> list[str]:
    """A comma-separated list, checked."""
    names = [name for name in given.split(",") if name]
    wrong = [name for name in names if name not in choices]
    if wrong or not names:
        raise InputError(f"{what}: {', '.join(wrong) or 'nothing'} is not one of {', '.join(choices)}")
    return names


def run_blocks(shapes: list[str], threads: list[int], rows: str, flags: list[str]) -> list[dict[str, Any]]:
    """Blocks; a shape that does not fit into memory is left out and named."""
    found = []
    for shape in shapes:
        if available() < SHAPES[shape].needed:
            need, have = SHAPES[shape].needed / 2**30, available() / 2**30
            console.note(f"shape {shape} is LEFT OUT: it needs {need:.1f} GiB and {have:.1f} are free")
            continue
        found += [part("blocks", ["--shape", shape, "--rows", rows, *flags], count) for count in threads]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--shapes", help="of blocks: demo, e64, e8 (default: all three; quick: demo, e64)")
    parser.add_argument("--rows", default="1,8,64,512", help="T of blocks")
    parser.add_argument("--models", help="demo, olmoe (default: both; quick: loading of demo only)")
    parser.add_argument("--threads", help="default: 1,2; quick: 1")
    parser.add_argument("--work", type=Path, help=f"where models are kept (default: {default_work()})")
    parser.add_argument("--out", type=Path, help="directory for results.json and blocks.png")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    parts = chosen("--parts", arguments.parts, PARTS)
    shapes = chosen("--shapes", arguments.shapes or ("demo,e64" if arguments.quick else "demo,e64,e8"), tuple(SHAPES))
    models = chosen("--models", arguments.models or ",".join(MODELS), MODELS)
    given = arguments.threads or ("1" if arguments.quick else "1,2")
    threads = [int(count) for count in chosen("--threads", given, ("1", "2"))]
    quick = ["--quick"] if arguments.quick else []
    keep = ["--work", str(arguments.work)] if arguments.work else []
    if "olmoe" in models and {"whole", "loading"} & set(parts):
        olmoe_like(arguments.work)
    blocks = run_blocks(shapes, threads, arguments.rows, quick) if "blocks" in parts else []
    wholes, loadings = [], []
    if "whole" in parts:
        wholes = [part("whole", ["--model", model, *keep, *quick], count) for model in models for count in threads]
    if "loading" in parts:
        some = [m for m in models if m == "demo" or not arguments.quick or arguments.models]
        loadings = [part("loading", ["--model", model, *keep, *quick], threads[0]) for model in some]
    block_tables(blocks)
    whole_tables(wholes)
    loading_tables(loadings)
    held = bars(blocks, wholes, loadings)
    bar_table(held)
    made = made_with() | {"processor": processor(), "seconds": time.perf_counter() - begin}
    everything = {"bars": held, "blocks": blocks, "whole": wholes, "loading": loadings, **made}
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with atomic_file(arguments.out / "results.json") as path:
            path.write_text(json.dumps(console.plain(everything), indent=1), encoding="utf-8")
        if blocks:
            draw_blocks(blocks, arguments.out / "blocks.png")
    console.last_line(short(everything))


def short(everything: dict[str, Any]) -> dict[str, Any]:
    """The JSON line: ratios without what lies around them."""

    def ratios(times: dict[str, Any]) -> dict[str, Any]:
        return {k: {n: round(v["ratio"], 3) for n, v in rows.items() if "ratio" in v} for k, rows in times.items()}

    return everything | {
        "blocks": [
            {key: b[key] for key in ("shape", "threads", "errors")} | {"ratios": ratios(b["times"])}
            for b in everything["blocks"]
        ],
        "whole": [
            {key: w[key] for key in ("model", "threads", "watch")} | {"ratios": ratios(w["times"])}
            for w in everything["whole"]
        ],
    }


if __name__ == "__main__":
    script(main)
