"""Planning: from a profile to a plan. Pure functions over numpy, hot loops compiled; no torch, no model, no clock."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from equipoise.errors import InputError
from equipoise.files.profile_npz import check_profile
from equipoise.options import PlanOptions
from equipoise.planning.front import FrontPoint, pareto_front
from equipoise.planning.joint import plan_joint
from equipoise.planning.paper import plan_paper
from equipoise.planning.parts import take as take_part
from equipoise.planning.replicas import replica_counts, water_fill
from equipoise.types import Plan, Profile

__all__ = ["FrontPoint", "pareto_front", "plan", "replica_counts", "take_part", "water_fill"]


def plan(
    profile: Profile, options: PlanOptions | None = None, *, previous: Plan | None = None, **overrides: Any
) -> Plan:
    """Plan replicas and precision.

    Args:
        profile: what was measured.
        options: how to plan; None for the defaults.
        previous: a plan in place; slots stay on its ranks as far as balance permits (`predicted["moved_bytes"]`).
        **overrides: fields of `PlanOptions` that replace those of `options`, e.g. `budget=1.0`.

    Returns:
        A plan that fits its budget and passes `equipoise.files.plan_json.check_plan`.

    Raises:
        InputError: an option or the profile is wrong, or the budget is too small for any plan.
    """
    base = options or PlanOptions()
    try:
        chosen = replace(base, **overrides)
    except TypeError as error:
        raise InputError(f"plan option: {error}") from error
    checked = check_profile(profile)
    make = plan_paper if chosen.preset == "paper" else plan_joint
    return make(checked, chosen, previous)
