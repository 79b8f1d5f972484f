"""Picture of a Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from equipoise.files import atomic_file
from equipoise.planning.front import FrontPoint


def draw_front(points: Sequence[FrontPoint], path: Path) -> None:
    """Plot LIS against quality loss, the chosen plan marked.

    Args:
        points: of `equipoise.planning.pareto_front`.
        path: PNG to write, whole or not at all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([p.quality_loss for p in points], [p.lis for p in points], "o-", color="#33658a", label="Pareto front")
    chosen = [p for p in points if p.chosen]
    axes.plot(
        [p.quality_loss for p in chosen], [p.lis for p in chosen], "*", color="#d1495b", markersize=16, label="chosen"
    )
    axes.set_xlabel("quality loss: importance-weighted share of tokens on low slots")
    axes.set_ylabel("LIS, mean over layers (1 = perfect balance)")
    axes.set_title(f"Balance against quality at {points[0].plan.budget.limit_bytes:,} bytes")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(Path(path)) as partial:
        figure.savefig(partial, format="png")
