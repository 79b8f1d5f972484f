"""Commands side by side, each a process of its own; one that fails is named and stops none of the others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

Commands = Mapping[str, Sequence[str]]
"""Arguments of a command by the name it is reported under."""


def run(commands: Commands, jobs: int, threads: int) -> list[str]:
    """Run every command, at most `jobs` at a time, and report each on stderr when it ends.

    Args:
        commands: started in their order.
        jobs: processes at a time.
        threads: of each process. Libraries that count the cores would each take all of them otherwise.

    Returns:
        a line for each command that failed: its name, how it ended, and its last line on stderr.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(_one, command, environment): name for name, command in commands.items()}
        for number, done in enumerate(as_completed(running), start=1):
            name, (why, seconds) = running[done], done.result()
            said = f"{name}: {why or 'done'}"
            print(f"[{number}/{len(commands)}] {said}, {seconds:.0f} s", file=sys.stderr, flush=True)
            if why:
                failed.append(said)
    return failed


def _one(command: Sequence[str], environment: Mapping[str, str]) -> tuple[str, float]:
    """Why a command failed (empty: it did not) and its seconds of wall time."""
    begin = time.monotonic()
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"could not be started: {error}", time.monotonic() - begin
    if not done.returncode:
        return "", time.monotonic() - begin
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no message"]
    return f"ended with {done.returncode}: {last[0]}", time.monotonic() - begin
