"""The Pareto front: what balance costs in quality at the same byte budget.

The joint problem is solved at a range of exchange rates (`quality_weight`); every solution is optimal for its
rate, so together they are the front's supported points. `slot_weight` stays as given: with 0 the front reaches
down to the lowest LIS that the budget allows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from equipoise.errors import InputError
from equipoise.options import PlanOptions
from equipoise.planning.joint import plan_joint
from equipoise.types import Plan, Profile


@dataclass(frozen=True)
class FrontPoint:
    """One plan of the front.

    Attributes:
        lis: predicted LIS, mean over layers.
        quality_loss: importance-weighted share of tokens that meet the lower precision, 0 to 1.
        replicas, quantized: as in the plan.
        quality_weight: exchange rate at which it is optimal.
        chosen: True for the rate that the options ask for.
        plan: the plan.
    """

    lis: float
    quality_loss: float
    replicas: int
    quantized: int
    quality_weight: float
    chosen: bool
    plan: Plan


def pareto_front(profile: Profile, options: PlanOptions, points: int = 15) -> list[FrontPoint]:
    """Plans from the best balance to the least quality loss, by falling loss; none is worse in both than another.

    Args:
        profile: what was measured.
        options: preset `joint`; its own quality weight gives the chosen point.
        points: exchange rates tried, from 1/64 to 4096 times the default, besides the chosen one.

    Raises:
        InputError: the preset has no front, or the budget is too small.
    """
    if options.preset != "joint":
        raise InputError("the paper's preset has a single plan and no front: use preset joint")
    weights = sorted({options.quality_weight, *np.geomspace(1 / 64, 4096, points).tolist()})
    found = []
    for weight in weights:
        plan = plan_joint(profile, replace(options, quality_weight=weight))
        point = FrontPoint(
            plan.predicted["lis"],
            plan.predicted["quality_loss"],
            plan.num_replicas,
            plan.num_quantized,
            weight,
            weight == options.quality_weight,
            plan,
        )
        found.append(point)
    return _efficient(found)


def _efficient(points: list[FrontPoint]) -> list[FrontPoint]:
    """Points that no other beats in both measures, one of each pair of figures, the chosen one always kept."""
    kept: list[FrontPoint] = []
    for p in points:
        beaten = any(
            q is not p
            and q.lis <= p.lis
            and q.quality_loss <= p.quality_loss
            and ((q.lis, q.quality_loss) != (p.lis, p.quality_loss) or q.chosen or q in kept)
            for q in points
        )
        if p.chosen or not beaten:
            kept.append(p)
    return sorted(kept, key=lambda p: (-p.quality_loss, p.lis))
