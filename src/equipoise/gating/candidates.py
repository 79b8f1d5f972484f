"""The plans a gate chooses from: the Pareto front at the byte budget, and the unchanged model behind it."""

from __future__ import annotations

from dataclasses import replace

from equipoise.errors import InputError
from equipoise.gating.search import spread
from equipoise.options import PlanOptions
from equipoise.planning import FrontPoint, pareto_front, plan
from equipoise.types import Plan, Profile


def check_plan_options(options: PlanOptions) -> None:
    """Refuse what leaves a gate without a front, or without the unchanged model to fall back on.

    Raises:
        InputError: preset paper, a budget below 1, a fixed number of slots.
    """
    if options.preset != "joint":
        raise InputError("the paper's preset has a single plan and no front to search: use preset joint with a gate")
    if options.budget is not None and options.budget < 1:
        raise InputError(
            f"a gate falls back on the unchanged model, which does not fit budget {options.budget:g}: give at least 1, "
            "or leave the gate out"
        )
    for name in ("replicas", "slots"):
        if getattr(options, name):
            raise InputError(
                f"{name} fixes the slots of a layer, but a gate falls back on the unchanged model: leave one out"
            )


def candidates(profile: Profile, options: PlanOptions, tries: int) -> tuple[list[FrontPoint], Plan]:
    """Plans worth measuring, from the most balanced to the safest, and the unchanged model as a plan.

    The order is by predicted LIS, which is also that of predicted quality loss. A plan that is no better balanced than
    the unchanged model has nothing to offer, and one that another beats in both measures neither.

    Args:
        profile: what was measured.
        options: preset joint, budget 1 or more.
        tries: at most so many plans, spread over the front.
    """
    front = pareto_front(profile, options)
    # With no expert to lower and the original bytes there is nothing to plan but the ranks.
    unchanged = plan(profile, options, budget=1.0, max_quantized=0.0)
    limit = front[0].plan.budget.limit_bytes
    unchanged = replace(unchanged, budget=replace(unchanged.budget, limit_bytes=limit))
    kept: list[FrontPoint] = []
    for point in sorted(front, key=lambda p: (p.lis, p.quality_loss)):
        better = point.lis < unchanged.predicted["lis"]
        if better and (not kept or point.quality_loss < kept[-1].quality_loss):
            kept.append(point)
    return spread(kept, tries), unchanged
