"""Writes the tables of this folder's README from what was measured: trained models, and Table 1 with its notes.

    python benchmarks/switch/report.py --json benchmarks/switch/results/table1.json [--readme FILE]

Each table is found by its first line and replaced as a whole; the notes are the list right after Table 1. The text
around them is written by hand, so read it again after a run. The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import artifact
from model import EXPERTS

from equipoise.errors import InputError
from equipoise.files.atomic import atomic_file

README = Path(__file__).parent / "README.md"
HEADER = "| model | device | steps | tokens | minutes | held-out loss, spans | Wikipedia continued | pairs |"


def trained() -> str:
    """What the artifacts say about their training, a row each; a split model's row has the run it starts from first."""
    lines = [HEADER, "|---|---|---:|---:|---:|---:|---:|---:|"]
    for experts in EXPERTS:
        _, about = artifact.read(artifact.path_of(experts))
        runs = list(_runs(about))
        held = about["held_out"]
        losses = [f"{held[name]:.3f}" if name in held else "" for name in ("spans", "continuation", "pairs")]
        cells = [
            f"{experts} experts",
            about["options"].get("device", "cpu"),
            " + ".join(f"{run['steps']:,}" for run in runs),
            " + ".join(f"{run['tokens'] / 1e6:.1f} M" for run in runs),
            " + ".join(f"{run['options']['minutes']:g}" for run in runs),
            *losses,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _runs(about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The runs a model has behind it, the first one first."""
    if about.get("split"):
        yield from _runs(about["split"])
    yield about


def replaced(document: str, table: str, notes: list[str] | None = None) -> str:
    """The document with a table in the place of the one of the same first line, and the list after it replaced.

    Args:
        document: has that first line once.
        table: markdown.
        notes: replace the list that follows after an empty line; None: the list stays.

    Raises:
        InputError: there is no such table.
    """
    lines = document.splitlines()
    first = table.splitlines()[0]
    if lines.count(first) != 1:
        raise InputError(f"the document has {lines.count(first)} tables that begin with {first!r}, not one")
    begin = lines.index(first)
    end = next((n for n in range(begin, len(lines)) if not lines[n].startswith("|")), len(lines))
    put = table.splitlines()
    if notes is not None:
        put += ["", *(f"- {note}" for note in notes)]
        rest = next((n for n in range(end, len(lines)) if lines[n]), len(lines))
        if rest < len(lines) and lines[rest].startswith("- "):
            end = next((n for n in range(rest, len(lines)) if not lines[n].startswith(("- ", "  "))), len(lines))
    return "\n".join([*lines[:begin], *put, *lines[end:]]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file of table1.py")
    parser.add_argument("--readme", type=Path, default=README)
    arguments = parser.parse_args()
    for path in (arguments.json, arguments.readme):
        if not path.exists():
            raise InputError(f"{path} does not exist")
    found = json.loads(arguments.json.read_text(encoding="utf-8"))
    before = arguments.readme.read_text(encoding="utf-8")
    after = replaced(replaced(before, trained()), found["markdown"], found["notes"])
    with atomic_file(arguments.readme) as partial:
        partial.write_text(after, encoding="utf-8")
    print(json.dumps({"readme": str(arguments.readme), "changed": after != before}))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
