"""From arrays to a `Plan`: replica counts, low slots, ranks and shares become slots in the file's order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from equipoise.files import profile_hash
from equipoise.files.plan_json import check_plan
from equipoise.metrics import max_over_mean, rank_load, slot_lis, slot_load
from equipoise.options import PlanOptions
from equipoise.planning.churn import moved_bytes, require_same_cluster
from equipoise.planning.ranks import place_model, ranked_slots
from equipoise.planning.sizes import Sizes
from equipoise.types import Budget, FloatArray, IntArray, LayerPlan, ModelIdentity, Plan, Profile, Slot


def identity(profile: Profile) -> ModelIdentity:
    """What the profile says of its model; fields a trace does not carry are empty."""
    meta = profile.meta
    return ModelIdentity(
        name=str(meta.get("model") or ""),
        model_type=str(meta.get("model_type") or ""),
        num_layers=profile.num_layers,
        num_experts=profile.num_experts,
        top_k=profile.top_k,
        dtype=str(meta.get("dtype") or "").removeprefix("torch."),
    )


def layer_slots(replicas: IntArray, low_slots: IntArray, low_name: str) -> tuple[Slot, ...]:
    """The slots of one layer on one rank with even shares, sorted by expert, original precision first.

    Args:
        replicas: [E] slots of each expert, at least 1.
        low_slots: [E] how many of them are at the lower precision.
        low_name: that precision.
    """
    slots = []
    for expert, (r, q) in enumerate(zip(replicas.tolist(), low_slots.tolist(), strict=True)):
        names = ["original"] * (r - q) + [low_name] * q
        slots += [Slot(expert, name, 0, 1.0 / r) for name in names]  # type: ignore[arg-type]
    return tuple(slots)


def build_plan(
    profile: Profile,
    options: PlanOptions,
    sizes: Sizes,
    slots: Sequence[tuple[Slot, ...]],
    limit_bytes: int,
    preset: str,
    predicted: Mapping[str, float],
) -> Plan:
    """A checked plan.

    Args:
        profile: what it was planned from.
        options: how.
        sizes: bytes of the slots.
        slots: of each layer, in the file's order.
        limit_bytes: bytes allowed.
        preset: how it was made.
        predicted: what is expected, by name.
    """
    names = profile.layer_names or ("",) * profile.num_layers
    layers = tuple(
        LayerPlan(int(number), name, profile.num_experts, row)
        for number, name, row in zip(profile.layer_ids, names, slots, strict=True)
    )
    plan_bytes = sum(
        int((sizes.original if s.precision == "original" else sizes.low)[i, s.expert])
        for i, layer in enumerate(layers)
        for s in layer.slots
    )
    return check_plan(
        Plan(
            model=identity(profile),
            profile_sha256=profile_hash(profile),
            preset=preset,
            seed=options.seed,
            budget=Budget(sizes.total, int(limit_bytes), plan_bytes),
            ranks=options.ranks,
            layers=layers,
            predicted={name: float(value) for name, value in predicted.items()},
        )
    )


def finish(
    profile: Profile,
    options: PlanOptions,
    sizes: Sizes,
    replicas: IntArray,
    low_slots: IntArray,
    limit_bytes: int,
    preset: str,
    predicted: Mapping[str, float],
    *,
    load: Sequence[FloatArray],
    previous: Plan | None,
    lower: Callable[[int, IntArray], IntArray] | None = None,
    windows: FloatArray | None = None,
) -> Plan:
    """Place on ranks when there are several, build the plan, and say what it predicts.

    Args:
        profile: what it was planned from.
        options: how.
        sizes: bytes of the slots.
        replicas: int64 [L, E] slots of each expert.
        low_slots: int64 [L, E] slots of each expert at the lower precision.
        limit_bytes: bytes allowed.
        preset: how it was made.
        predicted: what is expected besides `lis`, `lis_before` and the rank imbalances (`rank_imbalance`; and, where
            shares are not even, `rank_imbalance_even`, what it would be if they were).
        load: of each layer [W, E], the windows it is planned on.
        previous: a plan in place, whose slots should stay.
        lower: chooses the low slots of a layer anew when placement changed its replica counts; None: it may not.
        windows: [W, L, E] tokens, by which the guard judges whether `load` places better than the total.
    """
    counts = profile.counts.astype(np.float64)
    known = {"lis": 0.0, "lis_before": mean_lis(counts, np.ones_like(replicas)), **predicted}
    if previous is not None:
        require_same_cluster(previous, profile, options.ranks)
    if options.ranks > 1:
        measured = None if windows is None else (counts, windows)
        layouts = place_model(
            load, replicas, options, transfers=lower is not None, previous=previous, measured=measured
        )
        low = low_slots.copy()
        for i, layout in enumerate(layouts):
            if lower is not None and (layout.replicas != replicas[i]).any():
                low[i] = lower(i, layout.replicas)
        slots = ranked_slots(layouts, low, sizes, load, options, previous)
    else:
        slots = [layer_slots(r, q, sizes.low_name) for r, q in zip(replicas, low_slots, strict=True)]
    plan = build_plan(profile, options, sizes, slots, limit_bytes, preset, known)
    loads = [slot_load(n, layer) for n, layer in zip(counts, plan.layers, strict=True)]
    known["lis"] = float(np.mean([slot_lis(x, profile.num_experts) for x in loads]))
    if options.ranks > 1:
        known["rank_imbalance"] = _rank_imbalance(counts, plan.layers, options.ranks)
        even = tuple(layer.evenly() for layer in plan.layers)
        if even != plan.layers:
            known["rank_imbalance_even"] = _rank_imbalance(counts, even, options.ranks)
    if previous is not None:
        known["moved_bytes"] = float(moved_bytes(plan, previous, sizes.original, sizes.low))
    return replace(plan, predicted=known)


def _rank_imbalance(counts: FloatArray, layers: Sequence[LayerPlan], ranks: int) -> float:
    """Mean over layers of max over mean of the ranks, from tokens [L, E]."""
    on_ranks = [rank_load(slot_load(n, layer), layer, ranks) for n, layer in zip(counts, layers, strict=True)]
    return float(np.mean(max_over_mean(np.stack(on_ranks))))


def mean_lis(load: FloatArray, replicas: IntArray) -> float:
    """Mean over layers of LIS with evenly shared replicas.

    Args:
        load: [L, E] tokens of each expert.
        replicas: [L, E] slots of each expert.
    """
    n = np.asarray(load, dtype=np.float64)
    total = n.sum(-1)
    top = (n / replicas).max(-1) * n.shape[-1]
    return float(np.divide(top, total, out=np.ones_like(total), where=total > 0).mean())
