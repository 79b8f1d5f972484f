"""The picture of a replay: LIS of each policy step by step above, slots moved so far below."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np

from equipoise.files.atomic import atomic_file
from equipoise.streaming.replay import Replay

_STYLE = {
    "raw": ("#9aa0a6", "-"),
    "static": ("#b07d2b", "-"),
    "long": ("#3366cc", "-"),
    "short": ("#c2410c", "-"),
    "adaptive": ("#111111", "-"),
    "oracle": ("#2f855a", "--"),
}
"""Colour and line of each policy."""


def draw(result: Replay, path: Path, title: str, names: tuple[tuple[int, str], ...] = ()) -> None:
    """Write the picture as PNG, whole or not at all.

    Args:
        result: of a replay with at least one step.
        path: where to.
        title: what was replayed.
        names: (window at which a trace begins, its name).
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(9, 6), dpi=140, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps = [step.number for step in result.steps]
    means, moves = result.lis(), result.moves()
    for name in result.policies:
        colour, line = _STYLE.get(name, ("#666666", ":"))
        width = 2.0 if name == "adaptive" else 1.1
        values = [step.lis[name] for step in result.steps]
        above.plot(steps, values, line, color=colour, lw=width, label=f"{name} {means[name]:.2f}")
        if moves[name]:
            moved = np.cumsum([step.moves[name] for step in result.steps])
            below.plot(steps, moved, line, color=colour, lw=width, label=f"{name} {moves[name]:,}")
    for start, name in names[1:]:
        for axes in (above, below):
            axes.axvline(start, color="#cccccc", lw=0.8, zorder=0)
        above.annotate(
            name,
            (start, 1),
            xycoords=("data", "axes fraction"),
            fontsize=6,
            color="#777777",
            rotation=90,
            va="top",
            ha="right",
        )
    above.set_title(textwrap.fill(title, 100), fontsize=9, loc="left")
    above.set_ylabel("LIS (1 is perfect balance)")
    # Raw is often many times the rest, which would lie flat on a linear axis.
    if max(means.values()) > 3 * min(means.values()):
        above.set_yscale("log")
        above.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        above.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    below.set_ylabel("slots moved so far")
    below.set_xlabel("step (the first window only places)")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    with atomic_file(path) as partial, partial.open("wb") as handle:
        figure.savefig(handle, format="png")
