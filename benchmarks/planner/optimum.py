"""The joint preset against the optimum of a mixed-integer program (HiGHS) on random small models."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from equipoise.options import PlanOptions
from equipoise.planning import plan
from equipoise.planning.joint import SEVERITY, quality_cost
from equipoise.planning.sizes import slot_sizes
from equipoise.types import Plan, Profile


def objective(profile: Profile, options: PlanOptions, made: Plan) -> float:
    """What the joint preset minimises, recomputed from a plan's slots, times the number of layers."""
    sizes = slot_sizes(profile, options)
    cost = quality_cost(profile, options, sizes) * options.quality_weight * SEVERITY[sizes.low_name]
    total = 0.0
    for i, layer in enumerate(made.layers):
        n, r = profile.counts[i].astype(float), layer.replicas()
        low = np.bincount([s.expert for s in layer.slots if s.precision != "original"], minlength=len(n))
        total += len(n) * (n / r).max() / n.sum() + options.slot_weight / len(n) * (r.sum() - len(n))
        total += len(profile.counts) * (cost[i] * low / r).sum()
    return float(total)


def optimum(profile: Profile, options: PlanOptions, most: int, limit: int) -> float:
    """Lower bound proven by the solver; at most `most` slots an expert."""
    sizes = slot_sizes(profile, options)
    layers, experts = profile.counts.shape
    cost = quality_cost(profile, options, sizes) * options.quality_weight * SEVERITY[sizes.low_name] * layers
    keys = [
        (i, e, r, q) for i in range(layers) for e in range(experts) for r in range(1, most + 1) for q in range(r + 1)
    ]
    at = {k: j for j, k in enumerate(keys)}
    width = len(keys) + layers
    value, weight = np.append(np.zeros(len(keys)), np.ones(layers)), np.zeros(width)
    once, top = np.zeros((layers * experts, width)), np.zeros((layers * experts, width))
    fully = np.zeros((layers, width))
    for (i, e, r, q), j in at.items():
        value[j] = options.slot_weight / experts * (r - 1) + cost[i, e] * q / r
        weight[j] = (r - q) * sizes.original[i, e] + q * sizes.low[i, e]
        once[i * experts + e, j] = 1
        top[i * experts + e, j] = experts * profile.counts[i, e] / profile.counts[i].sum() / r
        top[i * experts + e, len(keys) + i] = -1
        fully[i, j] = q == r
    found = milp(
        value,
        constraints=[
            LinearConstraint(once, 1, 1),
            LinearConstraint(top, -np.inf, 0),
            LinearConstraint(fully, -np.inf, int(options.max_quantized * experts + 1e-9)),
            LinearConstraint(weight / 1000, -np.inf, limit / 1000),
        ],
        integrality=np.append(np.ones(len(keys)), np.zeros(layers)),
        bounds=Bounds(np.zeros(width), np.append(np.ones(len(keys)), np.full(layers, np.inf))),
        options={"mip_rel_gap": 1e-4, "time_limit": 30},
    )
    return float(found.mip_dual_bound)


def joint_gaps(instances: int) -> dict[str, float | int]:
    """Largest and mean relative distance to the solver's bound, and plans over budget, on random models."""
    rng = np.random.default_rng(0)
    gaps, over = [], 0
    for k in range(instances):
        shape = [(2, 8), (3, 6), (4, 8), (2, 12)][k % 4]
        counts = np.maximum(1, rng.lognormal(0, 1, shape) * 1000).astype(np.int64)
        profile = Profile(
            counts,
            np.arange(shape[0]),
            {"dtype": "bfloat16"},
            importance={"error": rng.gamma(1.0, 1.0, shape).astype(np.float32)},
            expert_bytes={"original": np.full(shape, 2000), "int8": np.full(shape, 1010)},
        )
        options = PlanOptions(
            budget=[0.8, 1.0, 1.25][k % 3], max_quantized=[0.5, 1.0][k % 2], quality_weight=[1.0, 5.0, 20.0][k % 3]
        )
        made = plan(profile, options)
        over += made.budget.plan_bytes > made.budget.limit_bytes
        best = optimum(profile, options, 8, made.budget.limit_bytes)
        gaps.append(objective(profile, options, made) / best - 1)
    return {
        "instances": instances,
        "largest_gap": max(gaps),
        "mean_gap": float(np.mean(gaps)),
        "over_budget": int(over),
    }
