"""Pictures of cost: load against importance, bytes by precision, change of perplexity by domain."""

from __future__ import annotations

import re

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from equipoise.reporting.figures import BOTH, MIB, QUANTIZED, REPLICATED, STATUS, UNTOUCHED, Figures
from equipoise.reporting.metrics_file import DomainPerplexity, Metrics
from equipoise.reporting.pictures_load import WIDTH, ticks
from equipoise.reporting.svg import LIGHT, inline, printable, style
from equipoise.types import PRECISIONS, FloatArray

MOST_PANELS = 12
"""Layers drawn one by one in the scatter; of a deeper model this many, evenly spaced, and all in the strip below."""

_MARKS = {
    UNTOUCHED: ("o", "muted"),
    REPLICATED: ("^", "replicated"),
    QUANTIZED: ("s", "quantized"),
    BOTH: ("D", "both"),
}


def shown_layers(layers: int) -> list[int]:
    """Rows of the layers the scatter draws: all, or `MOST_PANELS` evenly spaced with the first and the last."""
    return sorted({round(at) for at in np.linspace(0, layers - 1, min(layers, MOST_PANELS))})


def rho_text(rho: float) -> str:
    """A rank correlation for people; without one, why."""
    return "ρ undefined (constant)" if np.isnan(rho) else f"ρ = {rho:+.2f}"


def _layer(label: str) -> str:
    return f"layer {label}" if label.isdigit() else printable(label, 14)


def scatter(figures: Figures, name: str) -> str:
    """Load against one importance on the calibration text, a panel a layer, marked by what the plan did.

    Args:
        figures: of the run.
        name: which importance.
    """
    layers, _ = figures.shape
    rho = figures.rho[name]
    rows = shown_layers(layers)
    columns = min(len(rows), 4)
    lines = -(-len(rows) // columns)
    strip = layers > len(rows)
    load, importance = _relative(figures.calibration), _relative(figures.importance[name])
    known = rho[~np.isnan(rho)]
    median = f"{np.median(known):+.2f}" if len(known) else "undefined"
    with style():
        heights = [0.75 + (2.3 if lines == 1 else 1.75) * lines] + [1.6] * strip
        figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
        parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        panels = parts[0]
        grid = panels.add_gridspec(lines, columns)
        first: Axes | None = None
        for at, row in enumerate(rows):
            axes = panels.add_subplot(grid[at // columns, at % columns], sharex=first, sharey=first)
            first = first or axes
            _points(axes, load[row], importance[row], figures.status[row])
            axes.set_title(f"{_layer(figures.labels[row])}, {rho_text(float(rho[row]))}", weight="normal")
            axes.tick_params(labelbottom=at + columns >= len(rows), labelleft=at % columns == 0)
            if at == 0:
                for axis, values in (("x", load[rows]), ("y", importance[rows])):
                    _range(axes, axis, values)
        if strip:
            _strip(parts[1].add_subplot(), rho, figures.labels)
        small = {"fontsize": 8.5, "color": LIGHT["ink-2"]}
        panels.supxlabel("load over the layer's mean", **small)
        panels.supylabel(f"{printable(name, 14)} importance over the layer's mean", **small)
        marks = [
            panels.axes[0].plot([], [], _MARKS[s][0], label=STATUS[s], **_look(s, 5.5))[0]  # type: ignore[arg-type]
            for s in _MARKS
            if (figures.status == s).any()
        ]
        panels.legend(handles=marks, loc="outside upper left", ncols=4, handletextpad=0.2, columnspacing=1.6)
        return inline(
            figure,
            "importance-" + re.sub(r"[^A-Za-z0-9]", "-", name),
            f"Scatter of load against {printable(name)} importance of each expert on the calibration text; "
            f"rank correlation, median over layers: {median}",
        )


def _look(status: int, size: float) -> dict[str, object]:
    colour = LIGHT[_MARKS[status][1]]
    hollow = status == UNTOUCHED
    return {
        "linestyle": "none",
        "markersize": size,
        "markerfacecolor": "none" if hollow else colour,
        "markeredgecolor": colour if hollow else LIGHT["surface"],
        "markeredgewidth": 0.9 if hollow else 0.5,
    }


def _points(axes: Axes, load: FloatArray, importance: FloatArray, status: np.ndarray) -> None:
    axes.grid(True)
    size = 5.5 if len(load) <= 32 else 4.2 if len(load) <= 96 else 3.0
    for value, (marker, _) in _MARKS.items():
        here = status == value
        if here.any():
            axes.plot(load[here], importance[here], marker, **_look(value, size))  # type: ignore[arg-type]


def _range(axes: Axes, axis: str, values: FloatArray) -> None:
    """From zero, linear; above 8 times the mean logarithmic from the mean on, so that a few do not hide the rest."""
    top, bottom = float(values.max()), min(0.0, float(values.min()))
    if top > 8 and bottom >= 0:
        getattr(axes, f"set_{axis}scale")("symlog", linthresh=1, base=2)
        steps = [0, 1] + [4**p for p in range(1, 12) if 4**p <= top * 1.3]
        getattr(axes, f"set_{axis}ticks")(steps, [f"{s}" for s in steps])
        getattr(axes, f"set_{axis}lim")(-0.12, top * 1.4)
    else:
        room = 0.06 * (top - bottom) or 1.0
        getattr(axes, f"set_{axis}lim")(bottom - room, top + room)
        getattr(axes, f"{axis}axis").set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def _relative(values: np.ndarray) -> FloatArray:
    """[L, E] over the mean of each layer's absolute values; a layer of zeros stays zero."""
    array = values.astype(np.float64)
    mean = np.abs(array).mean(1, keepdims=True)
    return np.divide(array, mean, out=np.zeros_like(array), where=mean > 0)


def _strip(axes: Axes, rho: FloatArray, labels: list[str]) -> None:
    """Rank correlation of every layer."""
    axes.grid(axis="y")
    axes.axhline(0, color=LIGHT["axis"], linewidth=1)
    axes.vlines(np.arange(len(rho)), 0, np.nan_to_num(rho), color=LIGHT["axis"], linewidth=1.2)
    axes.plot(np.arange(len(rho)), rho, "o", color=LIGHT["ink-2"], markersize=3.5)
    axes.set_ylim(-1.08, 1.08)
    axes.set_xlim(-0.6, len(rho) - 0.4)
    axes.set_xticks(*ticks(labels, 24))
    axes.set_xlabel("MoE layer")
    axes.set_title("Rank correlation of load and importance (Spearman's ρ), every layer", weight="normal")


def bytes_picture(metrics: Metrics, limit_bytes: int) -> str:
    """Stacked bars of the routed experts' bytes by precision, before and after, and the budget."""
    parts = {"after": metrics.bytes_after, "before": metrics.bytes_before}
    names = [p for p in PRECISIONS if any(p in part for part in parts.values())]
    with style():
        figure = Figure(figsize=(WIDTH, 1.75), layout="constrained")
        axes = figure.add_subplot()
        totals = {which: sum(part.values()) / MIB for which, part in parts.items()}
        widest = max(*totals.values(), limit_bytes / MIB)
        left = dict.fromkeys(parts, 0.0)
        for name in names:
            for row, (which, part) in enumerate(parts.items()):
                size = part.get(name, 0) / MIB  # type: ignore[call-overload]
                if not size:
                    continue
                axes.barh(
                    row,
                    size,
                    left=left[which],
                    height=0.62,
                    color=LIGHT[name],
                    edgecolor=LIGHT["surface"],
                    linewidth=1.5,
                )
                if size > 0.09 * widest:
                    axes.text(
                        left[which] + size / 2,
                        row,
                        f"{size:,.2f}",
                        ha="center",
                        va="center",
                        color=LIGHT["surface"],
                        weight="bold",
                    )
                left[which] += size
        for row, total in enumerate(totals.values()):
            axes.text(widest * 1.012, row, f"{total:,.2f} MiB", va="center", weight="bold")
        axes.axvline(limit_bytes / MIB, color=LIGHT["ink"], linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(parts)), list(parts))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlim(0, widest * 1.12)
        axes.set_xlabel("tensors of the routed experts (MiB)")
        handles = [axes.barh(0, 0, color=LIGHT[name], label=name) for name in names]
        line = axes.plot([], [], color=LIGHT["ink"], linewidth=1.2, linestyle=(0, (4, 3)), label="budget")[0]
        figure.legend(handles=[*handles, line], loc="outside upper left", ncols=len(names) + 1, columnspacing=1.6)
        words = ", ".join(f"{which} {total:,.2f} MiB" for which, total in reversed(totals.items()))
        return inline(figure, "bytes", f"Bytes of the routed experts by precision: {words}")


def perplexity_picture(entries: list[DomainPerplexity]) -> str:
    """Change of perplexity on each domain with its 95 % interval, and the two perplexities beside it."""
    entries = sorted(entries, key=lambda entry: entry.domain != "all")
    with style():
        figure = Figure(figsize=(WIDTH, 1.0 + 0.3 * len(entries)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color=LIGHT["muted"], linewidth=1)
        axes.grid(axis="x")
        for row, entry in enumerate(entries):
            if entry.ci95 is not None:
                axes.plot(entry.ci95, (row, row), color=LIGHT["after"], linewidth=2.2, solid_capstyle="round")
            axes.plot(
                entry.delta_pct,
                row,
                "D" if entry.domain == "all" else "o",
                color=LIGHT["after"],
                markersize=7,
                markeredgecolor=LIGHT["surface"],
                markeredgewidth=1,
            )
            axes.text(
                1.015,
                row,
                f"{entry.before:,.3f} → {entry.after:,.3f}",
                transform=axes.get_yaxis_transform(),
                va="center",
                weight="bold" if entry.domain == "all" else "normal",
            )
        names = ["all text" if entry.domain == "all" else printable(entry.domain) for entry in entries]
        axes.set_yticks(range(len(entries)), names)
        axes.set_ylim(len(entries) - 0.4, -0.6)
        axes.text(1.015, 1.0, "perplexity before → after", transform=axes.transAxes, va="bottom", color=LIGHT["ink-2"])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        reach = max([0.01] + [abs(v) for e in entries for v in (e.delta_pct, *(e.ci95 or ()))])
        axes.set_xlim(-1.12 * reach, 1.12 * reach)
        axes.set_xlabel("change of perplexity (%); bar: paired 95 % interval; right of 0 is worse")
        pooled = next(entry for entry in entries if entry.domain == "all")
        return inline(
            figure,
            "perplexity",
            f"Change of perplexity by domain, pooled {pooled.delta_pct:+.3f} % "
            f"({pooled.before:.3f} before, {pooled.after:.3f} after)",
        )
