"""Table 1: the small Switch Transformers of benchmarks/switch, run as a process of their own (module names collide)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from sections import Section

from equipoise.errors import InputError

SCRIPT = Path(__file__).parents[1] / "switch" / "table1.py"


def measure(data: Path, work: Path, quick: bool) -> dict[str, Any]:
    """What `table1.py --json` writes: `rows`, `markdown`, `notes`.

    Raises:
        InputError: it failed; its last line says why.
    """
    work.mkdir(parents=True, exist_ok=True)
    result = work / ("table1-quick.json" if quick else "table1.json")
    command = [sys.executable, str(SCRIPT), "--data", str(data), "--work", str(work), "--json", str(result)]
    done = subprocess.run([*command, *(["--quick"] if quick else [])], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode or not result.exists():
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no message"]
        raise InputError(f"{SCRIPT.name} ended with {done.returncode}: {last[0]}")
    document: dict[str, Any] = json.loads(result.read_text())
    return document


def section(values: dict[str, Any], folder: Path, quick: bool) -> Section:
    """Its table and notes as they are."""
    notes = "\n".join(f"- {note}" for note in values["notes"])
    return Section("Table 1: a Switch Transformer, fine-tuned by eight strategies", f"{values['markdown']}\n\n{notes}")
