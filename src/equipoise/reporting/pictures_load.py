"""Pictures of balance: the load heat map before and after, LIS of each layer, the activation gap.

Colours carry one meaning in the whole report: orange is before, blue is after; in the heat map orange is more
than the mean load and blue is less. Both pairs survive the common colour-vision deficiencies, and neither is
the only carrier: panels, markers and tables say the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from equipoise.reporting.figures import Figures
from equipoise.reporting.svg import LIGHT, ONLY_DARK, ONLY_LIGHT, inline, printable, style
from equipoise.types import FloatArray

WIDTH = 9.6
"""Inches: 691 points, which the page shows about one and a half times as large."""

MOST_LINES = 12
"""Layers the gap draws one by one; of a deeper model it draws bands."""

_MAPS = {
    ONLY_LIGHT: LinearSegmentedColormap.from_list(
        "light", ["#0f3f7d", "#2a78d6", "#a5c9f2", "#f1f0ec", "#f6bd9b", "#e0622c", "#7d2508"]
    ),
    ONLY_DARK: LinearSegmentedColormap.from_list(
        "dark", ["#a9cffb", "#4a95ec", "#23507f", "#33332f", "#7d4023", "#e5763f", "#ffc9a8"]
    ),
}


def ticks(labels: Sequence[str], most: int) -> tuple[list[int], list[str]]:
    """At most `most` evenly spaced positions of a category axis and their labels."""
    step = max(1, -(-len(labels) // most))
    at = list(range(0, len(labels), step))
    return at, [printable(labels[i], 14) for i in at]


def heat_map(figures: Figures) -> str:
    """Layers x experts before and after, on one colour scale: load over the layer's mean expert load."""
    layers, experts = figures.shape
    top = max(2.0, float(figures.before.max()), float(figures.after.max()))
    side_by_side = experts <= 40
    rows = float(np.clip(layers * 0.26, 0.8, 1.6 if layers < 12 else 4.6))
    with style():
        height = (rows if side_by_side else 2 * rows + 0.75) + 1.35
        layout = ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.06, hspace=0.02, wspace=0.05)
        figure = Figure(figsize=(WIDTH, height), layout=layout)
        if side_by_side:
            grid = figure.add_gridspec(2, 4, height_ratios=[0.13, rows])
            bar, panels = grid[0, 1:3], (grid[1, :2], grid[1, 2:])
        else:
            grid = figure.add_gridspec(3, 4, height_ratios=[0.13, rows, rows])
            bar, panels = grid[0, 1:3], (grid[1, :], grid[2, :])
        _scale(figure.add_subplot(bar), top)
        titles = ("Before: each expert", "After: each expert's busiest slot")
        for panel, title, load in zip(panels, titles, (figures.before, figures.after), strict=True):
            axes = figure.add_subplot(panel)
            _heat(axes, load, top)
            axes.set_title(title)
            axes.set_xlabel("expert")
            axes.set_ylabel("MoE layer")
            axes.set_yticks(*ticks(figures.labels, 16))
            axes.set_xticks(*ticks([str(e) for e in range(experts)], 17))
        peak = f"{figures.before.max():.2f} before, {figures.after.max():.2f} after"
        return inline(
            figure,
            "heat",
            f"Heat map of load, {layers} layers by {experts} experts, before and after; largest load over mean: {peak}",
        )


def _heat(axes: Axes, load: FloatArray, top: float) -> None:
    """Two images of [L, E], one a theme; every cell is one pixel of the file, so size grows with L * E only."""
    layers, experts = load.shape
    place = (np.log2(np.clip(load, 1 / top, top)) / np.log2(top) + 1) / 2
    for gid, colours in _MAPS.items():
        image = axes.imshow(
            (colours(place)[..., :3] * 255).round().astype(np.uint8),
            interpolation="none",
            aspect="auto",
            extent=(-0.5, experts - 0.5, layers - 0.5, -0.5),
        )
        image.set_gid(gid)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    if experts <= 40 and layers <= 16:  # wide enough cells: a gap keeps neighbours apart
        axes.vlines(np.arange(experts - 1) + 0.5, -0.5, layers - 0.5, color=LIGHT["surface"], linewidth=1.2)
        axes.hlines(np.arange(layers - 1) + 0.5, -0.5, experts - 0.5, color=LIGHT["surface"], linewidth=1.2)


def _scale(axes: Axes, top: float) -> None:
    """The colour bar: log2 of load over mean, symmetric about 1."""
    _heat(axes, (top ** np.linspace(-1, 1, 129))[None, :], top)
    end = int(np.floor(np.log2(top) + 1e-9))
    step = 1 if end <= 3 else 2
    powers = [p for p in range(-end, end + 1) if p % step == 0]
    at = [64 + 64 * p / np.log2(top) for p in powers]
    axes.set_xticks(at, [f"1/{2**-p}×" if p < 0 else f"{2**p}×" for p in powers])
    axes.set_yticks([])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, pad=1)
    axes.set_title("load over the layer's mean expert load (1× is balanced)", loc="center", weight="normal", pad=4)


def lis_by_layer(figures: Figures) -> str:
    """LIS of each layer before and after, held out, with the in-sample figure of the plan as a hollow mark."""
    layers, _ = figures.shape
    x = np.arange(layers)
    size = 7 if layers <= 24 else 4.5
    with style():
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        axes = figure.add_subplot()
        every = np.concatenate([figures.lis_before, figures.lis_after, figures.lis_after_in_sample])
        if every.min() > 0 and every.max() / every.min() > 12:
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axes.set_ylim(0, 1.08 * max(float(every.max()), 1.0))
        axes.grid(axis="y")
        axes.axhline(1, color=LIGHT["muted"], linewidth=1, linestyle=(0, (4, 3)))
        axes.vlines(x, figures.lis_after, figures.lis_before, color=LIGHT["axis"], linewidth=1.4)
        mark = {"linestyle": "none", "markersize": size, "markeredgecolor": LIGHT["surface"], "markeredgewidth": 0.8}
        axes.plot(x, figures.lis_before, "o", color=LIGHT["before"], label="before, held out", **mark)  # type: ignore[arg-type]
        axes.plot(x, figures.lis_after, "D", color=LIGHT["after"], label="after, held out", **mark)  # type: ignore[arg-type]
        axes.plot(
            x,
            figures.lis_after_in_sample,
            "o",
            markerfacecolor="none",
            markeredgecolor=LIGHT["after"],
            markersize=size + 3.5,
            label="after, in sample (calibration text)",
        )
        axes.set_xlim(-0.6, layers - 0.4)
        axes.set_xticks(*ticks(figures.labels, 24))
        axes.set_xlabel("MoE layer")
        axes.set_ylabel("LIS (1 = even over experts)")
        figure.legend(loc="outside upper left", ncols=3, handletextpad=0.2, columnspacing=1.6)
        return inline(
            figure,
            "lis",
            f"LIS of {layers} layers, held out: mean {figures.lis_before.mean():.3f} before, "
            f"{figures.lis_after.mean():.3f} after",
        )


def gap_picture(figures: Figures) -> str:
    """Activation gap after each rank, before and after: the median over layers, and the layers around it."""
    layers, experts = figures.shape
    rank = np.arange(1, experts)
    positive = figures.gap_before[figures.gap_before > 0]
    threshold = float(10 ** np.floor(np.log10(100 * np.median(positive)))) if len(positive) else 1.0
    with style():
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        titles = ("Before: experts by load", "After: experts by load of their busiest slot")
        for axes, gaps, role, title in zip(
            panels, (figures.gap_before, figures.gap_after), ("before", "after"), titles, strict=True
        ):
            _gaps(axes, rank, 100 * gaps, LIGHT[role], threshold)
            axes.set_title(title)
            axes.set_xlabel("rank i of the expert in its layer (1 = busiest)")
        panels[0].set_ylabel("load of rank i − rank i+1\n(% of the layer's selections)")
        return inline(
            figure,
            "gap",
            f"Activation gap between consecutively ranked experts of {layers} layers: median first gap "
            f"{100 * np.median(figures.gap_before[:, 0]):.3f} % of selections before, "
            f"{100 * np.median(figures.gap_after[:, 0]):.3f} % after",
        )


def _gaps(axes: Axes, rank: npt.NDArray[np.int64], gaps: FloatArray, colour: str, threshold: float) -> None:
    """Lines of [L, E - 1] percent over rank; below `threshold` a logarithmic axis is linear down to 0."""
    few = len(rank) <= 40
    axes.grid(axis="y")
    if len(gaps) <= MOST_LINES:
        axes.plot(rank, gaps.T, color=colour, linewidth=0.8, alpha=0.35)
    else:
        for low, high, alpha in ((0, 100, 0.16), (10, 90, 0.26)):
            ends = np.percentile(gaps, (low, high), axis=0)
            axes.fill_between(rank, *ends, color=colour, alpha=alpha, linewidth=0)
    median = np.median(gaps, axis=0)
    axes.plot(rank, median, color=colour, linewidth=2, marker="o" if few else None, markersize=3.5)
    if few:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    else:
        # Hundreds of experts: a few large gaps and a long tail of small ones, some zero; both axes must stretch.
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_yscale("symlog", linthresh=threshold, linscale=0.4)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(bottom=0)
    axes.text(
        0.98,
        0.93,
        f"from rank 1 to 2: {median[0]:.3g} % (median)",
        transform=axes.transAxes,
        ha="right",
        va="top",
        color=LIGHT["ink-2"],
    )
