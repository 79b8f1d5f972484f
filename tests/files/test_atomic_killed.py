"""Writers killed with SIGKILL at random moments: what stands under the final name is always whole."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from equipoise.files import atomic_directory, atomic_file, require_destination

PARTS = ("a", "b", "sub/c")


def write_file(target: Path, version: int) -> None:
    with atomic_file(target) as partial, partial.open("w") as handle:
        for _ in range(200):
            handle.write(f"{version}\n")
            handle.flush()


def write_directory(target: Path, version: int) -> None:
    with atomic_directory(target, force=True) as partial:
        (partial / "sub").mkdir()
        for name in PARTS:
            with (partial / name).open("w") as handle:
                for _ in range(60):
                    handle.write(f"{version}\n")
                    handle.flush()


def whole(target: Path) -> bool:
    """Whether all that stands under the final name is one version."""
    if target.is_file():
        lines = target.read_text().split()
        return len(lines) == 200 and len(set(lines)) == 1
    versions = [tuple((target / name).read_text().split()) for name in PARTS]
    return len(set(versions)) == 1 and len(versions[0]) == 60 and len(set(versions[0])) == 1


def kill_in_the_middle(write: Callable[[Path, int], None], target: Path, delay: float, start: int) -> None:
    """Let a child write version after version, and kill it `delay` seconds after it has begun."""
    begun, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(tell, b"!")
            for version in range(start, start + 100_000):
                write(target, version)
        finally:
            os._exit(1)
    os.read(begun, 1)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    for end in (begun, tell):
        os.close(end)
    assert os.WIFSIGNALED(status), "the writer ended of itself"


@pytest.mark.parametrize("write", [write_file, write_directory])
def test_killed_at_many_points(tmp_path: Path, write: Callable[[Path, int], None]):
    target = tmp_path / "out"
    moments = random.Random(5)
    in_the_middle = 0
    for i in range(60):
        kill_in_the_middle(write, target, moments.uniform(0, 0.03), 1000 * i)
        left = [path.name for path in tmp_path.iterdir() if path != target]
        in_the_middle += bool(left)
        assert all(name.endswith((".partial", ".replaced")) for name in left)
        if target.exists():
            assert whole(target)
        elif any(name.endswith(".replaced") for name in left):
            require_destination(target, force=True)
            assert whole(target)  # what had been moved aside is back
    assert in_the_middle >= 10, "too few kills met a writer at work: the test shows nothing"
    write(target, 1)
    assert whole(target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
