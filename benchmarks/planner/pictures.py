"""Pictures of the planner benchmark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

COLOURS = {
    "greedy": "#9aa5b1",
    "eplb": "#d1495b",
    "ours": "#33658a",
    "guarded": "#33658a",
    "robust": "#8fb8de",
    "bound": "#2a9d5c",
}

LABELS = {"eplb": "EPLB", "guarded": "ours", "robust": "ours, guard 0"}


def draw_redundancy(rows: list[dict], path: Path) -> None:
    """Imbalance against redundancy: geometric mean over traces, a panel a number of ranks, in sample and held out."""
    ranks = sorted({r["ranks"] for r in rows})
    figure = Figure(figsize=(3 * len(ranks), 6), dpi=110, layout="constrained")
    axes = figure.subplots(2, len(ranks), sharex=True, squeeze=False)
    lines = (
        ("in", ("greedy", "eplb", "ours"), "in sample"),
        ("out", ("greedy", "eplb", "guarded", "robust"), "held out"),
    )
    for column, g in enumerate(ranks):
        for row, (kind, names, label) in enumerate(lines):
            here = _filled([r for r in rows if r["ranks"] == g and f"{kind}_eplb" in r])
            amounts = sorted({r["redundancy"] for r in here})
            for name in names:
                means = [
                    np.exp(np.mean([np.log(r[f"{kind}_{name}"]) for r in here if r["redundancy"] == a]))
                    for a in amounts
                ]
                axes[row, column].plot(
                    [100 * a for a in amounts], means, "o-", color=COLOURS[name],
                    label=LABELS.get(name, name),
                )  # fmt: skip
            if kind == "in":
                means = [np.exp(np.mean([np.log(r["bound"]) for r in here if r["redundancy"] == a])) for a in amounts]
                axes[row, column].plot([100 * a for a in amounts], means, "k--", label="lower bound")
            axes[row, column].set_title(f"{g} ranks, {label}", fontsize=9)
            axes[row, column].grid(alpha=0.3)
            if column == 0:
                axes[row, column].set_ylabel("max / mean of the ranks")
                axes[row, column].legend(fontsize=7)
            if row == 1:
                axes[row, column].set_xlabel("redundant slots, %")
    figure.suptitle("Rank imbalance against redundancy, geometric mean over traces (1 is perfect)")
    figure.savefig(path)


def _filled(rows: list[dict]) -> list[dict]:
    """Every trace at every redundancy: where 12.5 % and 25 % round to the same slots, the run was made once."""
    out = []
    for trace in {r["trace"] for r in rows}:
        mine = sorted((r for r in rows if r["trace"] == trace), key=lambda r: r["redundancy"])
        for amount in (0.0, 0.125, 0.25):
            out.append({**[r for r in mine if r["redundancy"] <= amount][-1], "redundancy": amount})
    return out


def draw_sizes(rows: list[dict], path: Path) -> None:
    """Seconds a plan against L S log2 S, one line a series, and straight proportion through the smallest."""
    figure = Figure(figsize=(7.2, 4.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for series in {r["series"]: None for r in rows}:
        here = [r for r in rows if r["series"] == series]
        work = [r["layers"] * r["slots"] * np.log2(r["slots"]) for r in here]
        of = ", ".join(f"{_range(here, key)} {key}" for key in ("layers", "experts", "ranks"))
        label = series + ": " + of
        axes.loglog(work, [r["seconds"] for r in here], "o-", label=label)
    least = min(rows, key=lambda r: r["layers"] * r["slots"])
    work = np.array(sorted(r["layers"] * r["slots"] * np.log2(r["slots"]) for r in rows))
    unit = least["seconds"] / (least["layers"] * least["slots"] * np.log2(least["slots"]))
    axes.loglog(work, unit * work, "k:", alpha=0.6, label="linear")
    axes.set_xlabel("L S log2 S  (layers, slots a layer)")
    axes.set_ylabel("seconds to place all layers")
    axes.set_title("Cost against size")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    figure.savefig(path)


def _range(rows: list[dict], key: str) -> str:
    """Smallest to largest of a column."""
    low, high = min(r[key] for r in rows), max(r[key] for r in rows)
    return str(low) if low == high else f"{low}-{high}"
