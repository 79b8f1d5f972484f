"""Run by `test_checkpoint_killed`: forks writers, kills them at random moments, and looks at what is left.

    python checkpoint_killed.py MODEL PLAN SCRATCH KIND KILLS

The parent never writes; it has imported everything, so that a child is at work at once. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from equipoise.checkpoint import apply_checkpoint
from equipoise.files import atomic_directory, load_plan, require_destination, save_plan, save_profile
from equipoise.types import Profile


def write_checkpoint(model: Path, plan_file: Path, out: Path) -> None:
    apply_checkpoint(model, load_plan(plan_file), out)


def write_forced(model: Path, plan_file: Path, out: Path) -> None:
    apply_checkpoint(model, load_plan(plan_file), out, force=True)


def write_run(model: Path, plan_file: Path, out: Path) -> None:
    """What `balance` writes, in its order."""
    plan = load_plan(plan_file)
    profile = Profile(np.arange(24).reshape(3, 8), np.arange(3), {"model": "tiny"})
    with atomic_directory(out) as partial:
        save_profile(profile, partial / "profile.npz")
        save_plan(plan, partial / "plan.json")
        apply_checkpoint(model, plan, partial / "model")
        (partial / "metrics.json").write_text("{}")


WRITERS = {"checkpoint": write_checkpoint, "forced": write_forced, "run": write_run}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def run_child(write: object, arguments: tuple[Path, ...], delay: float | None) -> None:
    """Let a child write; kill it after `delay` seconds (None: let it end)."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            write(*arguments)  # type: ignore[operator]
            code = 0
        finally:
            os._exit(code)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if delay is None and status:
        raise SystemExit(f"a writer that was not killed failed: {status}")


def main(model: str, plan_file: str, scratch: str, kind: str, kills: str) -> None:
    torch.set_num_threads(1)
    write, root = WRITERS[kind], Path(scratch)
    source, plan = Path(model), Path(plan_file)
    began = time.monotonic()
    run_child(write, (source, plan, root / "reference"), None)
    seconds = time.monotonic() - began
    reference = contents(root / "reference")
    run_child(write, (source, plan, root / "second"), None)
    assert contents(root / "second") == reference, "two runs differ: completeness cannot be told from the bytes"
    work = root / "work"
    work.mkdir()
    out = work / "out"
    old = {"old": b"old"}
    seen: Counter[str] = Counter()
    moments = random.Random(11)
    for i in range(int(kills)):
        if kind == "forced":
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            (out / "old").write_bytes(b"old")
        run_child(write, (source, plan, out), seconds * 1.15 * (i + moments.random()) / int(kills))
        left = [path.name for path in work.iterdir() if path != out]
        seen["in the middle"] += bool(left)
        if any(name.endswith(".replaced") for name in left):
            seen["between the renames"] += 1
            require_destination(out, force=True)
        if not out.exists():
            seen["absent"] += 1
            assert kind != "forced", "the old state is lost"
            continue
        found = contents(out)
        if found == reference:
            seen["complete"] += 1
            shutil.rmtree(out)
        else:
            assert kind == "forced", f"half-written: {sorted(found)}"
            assert found == old, f"half-written: {sorted(found)}"
            seen["old"] += 1
    shutil.rmtree(out, ignore_errors=True)
    run_child(write, (source, plan, out), None)
    seen["swept"] = [path.name for path in work.iterdir()] == ["out"] and contents(out) == reference  # type: ignore
    print(json.dumps(dict(seen)))


if __name__ == "__main__":
    main(*sys.argv[1:])
