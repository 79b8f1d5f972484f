"""What every section of docs/results.md is made of.

A module of a section has

    measure(...)                     plain values (dicts, lists, numbers, text), kept as a cell
    section(values, folder, quick)   a `Section`: markdown, and pictures written into `folder`

and nothing that is measured is computed in `section`, so the document can be written anew from cells alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

PICTURES = "results"
"""Folder of the pictures beside results.md."""


@dataclass(frozen=True)
class Section:
    """A part of the document.

    Attributes:
        title: its heading.
        text: markdown; pictures are named by `picture`.
    """

    title: str
    text: str


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table; the first column is left-aligned, the others to the right."""
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def interval(value: float, low: float, high: float, digits: int = 1) -> str:
    """A signed figure with its 95 % interval: `+0.2 [-0.4, +0.8]`."""
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def picture(path: Path, words: str) -> str:
    """Markdown of a picture in `PICTURES`."""
    return f"![{words}]({PICTURES}/{path.name})"
