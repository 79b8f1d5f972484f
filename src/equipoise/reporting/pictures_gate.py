"""Picture of an accuracy gate: predicted imbalance against measured loss, with intervals and the bound."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from equipoise.reporting.gate_metrics import FrontEntry, Gate
from equipoise.reporting.pictures_load import WIDTH
from equipoise.reporting.svg import LIGHT, inline, style

LABELS = {"accuracy": "drop of accuracy (points)", "perplexity": "rise of perplexity (%)"}

_LOOK = {
    "accepted": ("D", LIGHT["after"], LIGHT["surface"]),
    "passed": ("o", LIGHT["surface"], LIGHT["after"]),
    "refused": ("X", LIGHT["before"], LIGHT["surface"]),
}
"""State -> (marker, face, edge); an edge in the page's colour lifts a mark off its bar."""


def gate_picture(gate: Gate) -> str:
    """Every plan that was tried, by its number in the table, a panel a bound; those not tried as marks on the axis."""
    bounds = {"accuracy": gate.bounds.max_accuracy_drop, "perplexity": gate.bounds.max_perplexity_rise}
    shown = {name: bound for name, bound in bounds.items() if bound is not None}
    with style():
        figure = Figure(figsize=(WIDTH, 0.55 + 2.9 * len(shown)), layout="constrained")
        panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, bound) in zip(panels, shown.items(), strict=True):
            _panel(axes, gate, name, bound)
        panels[-1].set_xlabel("LIS predicted, mean over layers: the most balanced plan is on the left")
        handles = []
        states = {entry.state for entry in gate.front if not entry.unchanged}
        for state, (marker, face, edge) in _LOOK.items():
            if state in states:
                handles += panels[0].plot([], [], marker, label=state, **_mark(face, edge))  # type: ignore[arg-type]
        if "not tried" in states:
            handles += panels[0].plot([], [], "|", label="not tried", color=LIGHT["muted"], markersize=8)
        handles += panels[0].plot([], [], "s", label="unchanged model", color=LIGHT["muted"], markersize=6)
        handles += panels[0].plot([], [], label="bound", **_bound_line())  # type: ignore[arg-type]
        figure.legend(handles=handles, loc="outside upper left", ncols=6, handletextpad=0.5, columnspacing=1.6)
        return inline(figure, "gate", _words(gate))


def _panel(axes: Axes, gate: Gate, name: str, bound: float) -> None:
    axes.grid(axis="y")
    axes.axhline(0, color=LIGHT["muted"], linewidth=1)
    axes.axhline(bound, **_bound_line())  # type: ignore[arg-type]
    reach = [0.0, bound]
    for number, entry in enumerate(gate.front, 1):
        if entry.unchanged:
            axes.plot(entry.lis, 0, "s", color=LIGHT["muted"], markersize=6)
            continue
        one = next((m for m in entry.measured if m.measure == name), None)
        if one is None:
            axes.plot(entry.lis, 0, "|", color=LIGHT["muted"], markersize=8, transform=axes.get_xaxis_transform())
            continue
        marker, face, edge = _LOOK[entry.state]
        colour = LIGHT["before" if entry.state == "refused" else "after"]
        axes.vlines(entry.lis, *one.ci95, color=colour, linewidth=2)
        axes.plot(entry.lis, one.loss, marker, **_mark(face, edge))  # type: ignore[arg-type]
        axes.annotate(
            str(number), (entry.lis, one.ci95[1]), (0, 3), textcoords="offset points", ha="center", va="bottom"
        )
        reach += one.ci95
    room = 0.1 * (max(reach) - min(reach))
    axes.set_ylim(min(reach) - room, max(reach) + 1.4 * room)
    axes.set_ylabel(LABELS[name])


def _mark(face: str, edge: str) -> dict[str, object]:
    return {
        "linestyle": "none",
        "markersize": 7.5,
        "markerfacecolor": face,
        "markeredgecolor": edge,
        "markeredgewidth": 1.2,
    }


def _bound_line() -> dict[str, object]:
    return {"color": LIGHT["ink"], "linewidth": 1.2, "linestyle": (0, (4, 3))}


def _words(gate: Gate) -> str:
    """What a screen reader says."""

    def one(number: int, entry: FrontEntry) -> str:
        what = "unchanged model" if entry.unchanged else f"plan {number}"
        found = ", ".join(f"{m.measure} worse by {m.loss:.3f}, at worst {m.ci95[1]:.3f}" for m in entry.measured)
        return f"{what}, LIS {entry.lis:.2f}, {entry.state}" + (f" ({found})" if found else "")

    return "Plans of the gate: " + "; ".join(one(i, entry) for i, entry in enumerate(gate.front, 1))
