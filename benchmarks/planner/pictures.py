"""Pictures of the planner benchmark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

COLOURS = {"greedy": "#9aa5b1", "eplb": "#d1495b", "ours": "#33658a", "robust": "#33658a", "bound": "#2a9d5c"}


def draw_redundancy(rows: list[dict], path: Path) -> None:
    """Imbalance against redundancy: geometric mean over traces, a panel a number of ranks, in sample and held out."""
    ranks = sorted({r["ranks"] for r in rows})
    figure = Figure(figsize=(3 * len(ranks), 6), dpi=110, layout="constrained")
    axes = figure.subplots(2, len(ranks), sharex=True, squeeze=False)
    lines = (
        ("in", ("greedy", "eplb", "ours"), "in sample"),
        ("out", ("greedy", "eplb", "robust"), "held out"),
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
                    label={"eplb": "EPLB", "robust": "ours (windows)"}.get(name, name),
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
    """Seconds a plan against slots, one line a number of layers, and L S log S through the smallest."""
    figure = Figure(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for layers in sorted({r["layers"] for r in rows}):
        here = [r for r in rows if r["layers"] == layers]
        axes.loglog([r["slots"] for r in here], [r["seconds"] for r in here], "o-", label=f"{layers} layers")
        first = here[0]
        unit = first["seconds"] / (first["slots"] * np.log2(first["slots"]))
        axes.loglog(
            [r["slots"] for r in here], [unit * r["slots"] * np.log2(r["slots"]) for r in here], "k:", alpha=0.5
        )
    axes.set_xlabel("slots a layer (experts 64 to 1024, ranks 8 to 512)")
    axes.set_ylabel("seconds to place all layers")
    axes.set_title("Cost against size; dotted: L S log S through the smallest")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path)
