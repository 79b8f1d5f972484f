"""From arrays to a `Plan`: replica counts, low slots, ranks and shares become slots in the file's order."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from equipoise.files import profile_hash
from equipoise.files.plan_json import check_plan
from equipoise.options import PlanOptions
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
    replicas: IntArray,
    low_slots: IntArray,
    limit_bytes: int,
    preset: str,
    predicted: Mapping[str, float],
) -> Plan:
    """A checked plan on one rank.

    Args:
        profile: what it was planned from.
        options: how.
        sizes: bytes of the slots.
        replicas: int64 [L, E] slots of each expert.
        low_slots: int64 [L, E] slots of each expert at the lower precision.
        limit_bytes: bytes allowed.
        preset: how it was made.
        predicted: what is expected, by name.
    """
    names = profile.layer_names or ("",) * profile.num_layers
    layers = tuple(
        LayerPlan(int(number), name, profile.num_experts, layer_slots(replicas[i], low_slots[i], sizes.low_name))
        for i, (number, name) in enumerate(zip(profile.layer_ids, names, strict=True))
    )
    return check_plan(
        Plan(
            model=identity(profile),
            profile_sha256=profile_hash(profile),
            preset=preset,
            seed=options.seed,
            budget=Budget(sizes.total, int(limit_bytes), sizes.of(replicas, low_slots)),
            ranks=1,
            layers=layers,
            predicted={name: float(value) for name, value in predicted.items()},
        )
    )


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
