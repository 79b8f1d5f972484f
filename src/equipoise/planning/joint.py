"""Replicas and precisions planned together under one byte budget for the whole model.

    minimise   mean_l LIS_l  +  slot_weight * mean_l R_l / E  +  quality_weight * quality loss
    subject to bytes(plan) <= budget * bytes(original),
               at most max_quantized * E experts of a layer without a slot at the original precision

An expert with r slots, q of them at the lower precision, weighs (r - q) * original + q * low bytes, puts n/r tokens
on a slot, and loses importance * q / r: that share of its tokens meets the lower precision.

Quality loss is the importance-weighted share of tokens that meet the lower precision, in [0, 1] over the model,
times `SEVERITY`: what lowering every expert is worth in units of LIS. Per-channel int8 was measured to be nearly
free (all experts of a real model: perplexity -0.006 % +- 0.16 %), so all of it weighs as little as 0.05 of LIS;
`quality_weight` scales that. `slot_weight` is what keeps a plan from buying replicas that hardly help: a replica
costs no bytes of the budget once it is paid for, but makes every slot's batch smaller.

Without a budget to fill, the optimum stops by itself. The solver is `knapsack`; what a layer can do is
`layer_options`. Bytes are exact integers: a plan is never over budget.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from equipoise.errors import InputError
from equipoise.options import PlanOptions
from equipoise.planning.assemble import finish
from equipoise.planning.importance import precision_cost
from equipoise.planning.knapsack import Choice, LayerProblem, choose
from equipoise.planning.layer_options import low_slots, slots_of
from equipoise.planning.replicas import water_fill
from equipoise.planning.robust import effective_load, lis_curve, placement_load, shrink, windows_of
from equipoise.planning.sizes import Sizes, slot_sizes
from equipoise.types import FloatArray, IntArray, Plan, Profile

_NO_ORDER = np.empty(0, dtype=np.int64)

SEVERITY = {"int8": 0.05, "int8_weight_only": 0.05, "float16": 0.005}
"""LIS that holding every expert at this precision is worth (the exchange rate at quality_weight 1)."""


def plan_joint(profile: Profile, options: PlanOptions, previous: Plan | None = None) -> Plan:
    """Plan replicas and precisions together; see the module.

    Raises:
        InputError: the budget is too small for any plan, or the profile lacks what the options ask for.
    """
    if options.strategy != "rq":
        raise InputError(f"strategy {options.strategy} is an ablation of preset paper: give --preset paper")
    sizes = slot_sizes(profile, options)
    cost = quality_cost(profile, options, sizes)
    load = robust_load(profile, options)
    limit, problems = layer_problems(profile, options, sizes, cost, load)
    choice = choose(problems, limit)
    if choice is None:
        raise _too_small(problems, sizes, limit, options)
    replicas, low = _slots(problems, choice)

    def lower(i: int, slots: IntArray) -> IntArray:
        return low_slots(slots, int(choice.units[i]), problems[i].cost, problems[i].most_low)

    place_by = [placement_load(rows) for rows in load]
    windows = windows_of(profile, options.robust_windows) if options.ranks > 1 else None
    plan = finish(
        profile, options, sizes, replicas, low, limit, "joint", {},
        load=place_by, previous=previous, lower=lower, windows=windows,
    )  # fmt: skip
    return replace(plan, predicted={**plan.predicted, "quality_loss": quality_loss(cost, plan)})


def quality_cost(profile: Profile, options: PlanOptions, sizes: Sizes) -> FloatArray:
    """Cost of each expert as a share of the whole model's, [L, E], summing to 1; none is free.

    A thousandth of the mean is added to each, so that precision is not spent on experts of zero cost for nothing.
    """
    cost = precision_cost(profile, options)
    cost = cost + (cost.mean() * 1e-3 or 1.0)
    return cost / cost.sum()


def quality_loss(cost: FloatArray, plan: Plan) -> float:
    """Importance-weighted share of tokens that meet the lower precision: 0 none, 1 all.

    Args:
        cost: [L, E] of `quality_cost`.
        plan: its slots say where the lower precision is and what part of an expert's tokens meets it.
    """
    rows = zip(cost, plan.layers, strict=True)
    return float(sum(row[s.expert] * s.share for row, layer in rows for s in layer.slots if s.precision != "original"))


def layer_problems(
    profile: Profile, options: PlanOptions, sizes: Sizes, cost: FloatArray, load: list[FloatArray]
) -> tuple[int, list[LayerProblem]]:
    """The bytes allowed, and each layer's part of the problem.

    Raises:
        InputError: the experts of a layer differ in size, or low slots save nothing.
    """
    layers, experts = profile.counts.shape
    most_low = int(options.max_quantized * experts + 1e-9)
    for l in range(layers):  # noqa: E741
        for what, row in (("original", sizes.original[l]), (sizes.low_name, sizes.low[l])):
            if (row != row[0]).any():
                raise InputError(
                    f"layer {profile.layer_ids[l]}: {what} bytes differ between experts ({row.min()} to {row.max()}); "
                    "preset joint needs experts of one size a layer: use preset paper"
                )
        if sizes.low[l, 0] >= sizes.original[l, 0]:
            raise InputError(
                f"layer {profile.layer_ids[l]}: a slot takes {sizes.low[l, 0]:,} bytes as {sizes.low_name} and "
                f"{sizes.original[l, 0]:,} as it is: choose another low precision"
            )
    fixed = options.replicas
    if options.slots:
        fixed = _spare_of_slots(options, experts)
    least = [_least_bytes(sizes, l, experts, most_low, fixed, profile) for l in range(layers)]  # noqa: E741
    limit = int((1.0 if options.budget is None else options.budget) * sizes.total)
    if options.budget is None:
        # `--replicas` asks for slots instead of a budget: what they need at least is allowed.
        limit = max(limit, sum(least))
    scale = layers * options.quality_weight * SEVERITY[sizes.low_name]
    problems = []
    for l in range(layers):  # noqa: E741
        n = effective_load(load[l])
        idle = not profile.counts[l].any()
        price = 0.0 if fixed is not None else options.slot_weight / experts
        if fixed is not None:
            spare = fixed
        elif idle:
            spare = 0
        else:
            spare = max(0, limit - sum(least)) // int(sizes.low[l, 0])
            if price:
                # Beyond this the price of the slots alone exceeds any gain of LIS.
                spare = min(spare, int(float(lis_curve(_NO_ORDER, load[l])[0]) / price))
        order, _ = water_fill(n, spare, options.ranks if options.ranks > 1 else None)
        lis = lis_curve(order, load[l])
        allowed = _allowed(len(lis), experts, options, fixed)
        # More replicas for no better a value are dominated: they take more bytes and lose no less quality.
        value = np.where(allowed, lis + price * np.arange(len(lis)), np.inf)
        allowed[1:] &= value[1:] < np.minimum.accumulate(value)[:-1]
        stop = int(np.flatnonzero(allowed)[-1]) + 1
        problems.append(
            LayerProblem(
                order=order[: stop - 1],
                lis=lis[:stop],
                allowed=allowed[:stop],
                cost=cost[l] * scale,
                most_low=0 if idle and fixed is None else most_low,
                original=int(sizes.original[l, 0]),
                saved=int(sizes.original[l, 0] - sizes.low[l, 0]),
                slot_price=price,
            )
        )
    return limit, problems


def robust_load(profile: Profile, options: PlanOptions) -> list[FloatArray]:
    """Load fractions of each layer in the windows planned on, L arrays [W, E]; see `robust`."""
    windows = windows_of(profile, options.robust_windows)
    return [shrink(np.ascontiguousarray(windows[:, l])) for l in range(windows.shape[1])]  # noqa: E741


def _spare_of_slots(options: PlanOptions, experts: int) -> int:
    """Replicas a layer that `slots` asks for."""
    if options.replicas is not None and options.replicas != options.slots - experts:
        raise InputError(f"slots {options.slots} and replicas {options.replicas} contradict each other: give one")
    if options.slots < experts:
        raise InputError(f"slots {options.slots} are too few for {experts} experts a layer")
    if options.slots % options.ranks:
        raise InputError(f"slots {options.slots} are not divisible by {options.ranks} ranks")
    return options.slots - experts


def _allowed(length: int, experts: int, options: PlanOptions, fixed: int | None) -> np.ndarray:
    """Numbers of replicas that may be chosen, bool [length]: the fixed one, or those that fill every rank."""
    if fixed is not None:
        return np.arange(length) == length - 1
    full = (experts + np.arange(length)) % options.ranks == 0
    # No number within the room fills the ranks evenly: keep one slot an expert, ranks differ by one slot.
    return full if full.any() else np.arange(length) == 0


def _least_bytes(sizes: Sizes, l: int, experts: int, most_low: int, fixed: int | None, profile: Profile) -> int:  # noqa: E741
    """Bytes of the smallest slots of a layer: as many low ones as `max_quantized` permits."""
    original, low = int(sizes.original[l, 0]), int(sizes.low[l, 0])
    if fixed is None and profile.counts[l].max() == 0:
        return experts * original
    return (experts - most_low) * original + (most_low + (fixed or 0)) * low


def _too_small(problems: list[LayerProblem], sizes: Sizes, limit: int, options: PlanOptions) -> InputError:
    """The refusal of a budget below the smallest plan, with the numbers."""
    smallest = 0
    for problem in problems:
        spare, units, _ = problem.best(1e9)  # bytes so dear that nothing else counts
        smallest += problem.bytes(spare, units)
    budget = 1.0 if options.budget is None else options.budget
    return InputError(
        f"budget {budget:g} allows {limit:,} bytes, but the smallest plan (max-quantized {options.max_quantized:g}, "
        f"{sizes.low_name}) takes {smallest:,}: give at least {math.ceil(1e4 * smallest / sizes.total) / 1e4}"
    )


def _slots(problems: list[LayerProblem], choice: Choice) -> tuple[IntArray, IntArray]:
    """Slots and low slots [L, E] of a choice."""
    parts = [
        slots_of(p.order, int(s), int(u), p.cost, p.most_low)
        for p, s, u in zip(problems, choice.spare, choice.units, strict=True)
    ]
    return np.stack([p[0] for p in parts]), np.stack([p[1] for p in parts])
