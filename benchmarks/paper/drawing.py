"""How the pictures of docs/results look: one width, one set of colours, written whole or not at all.

The colours are those of Okabe and Ito, which people with any of the common colour blindnesses can tell apart; lines
differ by marker or dash as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from equipoise.files.atomic import atomic_file

COLOURS = {
    "raw": "#6e6e6e", "original": "#6e6e6e", "paper": "#e69f00", "joint": "#0072b2", "oracle": "#009e73",
    "static": "#cc79a7", "long": "#e69f00", "short": "#d55e00", "adaptive": "#0072b2",
}  # fmt: skip
MARKERS = {
    "raw": "s", "original": "s", "paper": "^", "joint": "o", "oracle": "_",
    "static": "D", "long": "^", "short": "v", "adaptive": "o",
}  # fmt: skip
LABELS = {
    "raw": "model as it is", "paper": "R&Q (paper)", "joint": "joint", "oracle": "oracle",
    "static": "static", "long": "option 1 (long)", "short": "option 2 (short)", "adaptive": "adaptive",
}  # fmt: skip


def capital(words: str) -> str:
    """The same, with a capital to begin a sentence."""
    return words[:1].upper() + words[1:]


def canvas(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of 900 pixels width and its axes [rows, columns].

    Args:
        height: in hundreds of pixels.
        rows: of panels.
        columns: of panels.
        **options: of `Figure.subplots`.
    """
    figure = Figure(figsize=(9, height), dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.ravel():
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> Path:
    """Write a picture as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png")
    return path
