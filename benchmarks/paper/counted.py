"""Profiles, plans and their score from recorded selections alone: no model, no importance but the counts themselves.

    series     selections of consecutive prompts, merged into at most `WINDOWS` windows, which `joint` plans on
    paper      R&Q, one replica of the heavy hitter, the least selected other expert lowered
    joint      replicas and precision together at budget 1.0, quality by frequency
    LIS        of the selections of all scored prompts together: E * max_s load[s] / sum_e n[e], mean over layers

P prompts, L layers, E experts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

import equipoise as eq
from equipoise.scoring import score_counts
from equipoise.types import IntArray, Plan, Profile

WINDOWS = 16


def merged(counts: IntArray, most: int = WINDOWS) -> IntArray:
    """Neighbours of [P, L, E] merged into at most `most` windows of nearly as many each."""
    number = min(most, len(counts))
    return np.add.reduceat(counts, np.arange(number) * len(counts) // number, axis=0)


def counted_profile(counts: IntArray, template: Profile) -> Profile:
    """The profile of some prompts; model, layers and bytes are the template's.

    Args:
        counts: int64 [P, L, E].
        template: a profile of the same model.
    """
    return replace(
        template, counts=counts.sum(0), series=merged(counts), topk_ids=None,
        importance={}, meta={**template.meta, "data": f"{len(counts)} prompts", "tokens": 0},
    )  # fmt: skip


def counted_plans(profile: Profile) -> dict[str, Plan]:
    """`paper` and `joint` from counts."""
    return {
        "paper": eq.plan(profile, preset="paper", importance="frequency"),
        "joint": eq.plan(profile, budget=1.0, importance="frequency"),
    }


def lis_of(plan: Plan, counts: IntArray) -> dict[str, float]:
    """`raw`, `planned` and `oracle` (as many replicas a layer, placed by these counts) LIS of prompts [P, L, E]."""
    found = score_counts(plan, np.asarray(counts).sum(0)[None]).means()
    return {"raw": found["lis_raw"], "planned": found["lis"], "oracle": found["lis_oracle"]}
