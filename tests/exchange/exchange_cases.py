"""Plans and damaged bytes that the exchange tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from hypothesis import strategies as st

from equipoise.errors import InputError
from equipoise.types import Budget, LayerPlan, ModelIdentity, Plan, Precision, Slot

T = TypeVar("T")

NOTES_LAYER = [[0, 1, 2], [3, 0, 1]]
"""Ranks of the layer that the engines' notes show: 4 experts, 6 slots, 2 ranks."""


def layer_plan(number: int, held: Sequence[Sequence[int]], experts: int, lowered: Precision | None = None) -> LayerPlan:
    """A layer whose rank r holds the experts held[r]; further slots of an expert are `lowered` where given."""
    replicas = np.bincount([e for rank in held for e in rank], minlength=experts)
    slots, seen = [], set()
    for expert, rank in sorted((e, r) for r, own in enumerate(held) for e in own):
        precision: Precision = lowered if lowered and expert in seen else "original"
        seen.add(expert)
        slots.append(Slot(expert, precision, rank, 1 / int(replicas[expert])))
    return LayerPlan(number, f"model.layers.{number}.mlp.experts", experts, tuple(slots))


def plan_of(layers: Sequence[LayerPlan], ranks: int) -> Plan:
    experts = layers[0].num_experts
    identity = ModelIdentity("m", "mixtral", len(layers), experts, min(2, experts), "bfloat16")
    return Plan(identity, "0" * 64, "joint", 0, Budget(100, 200, 150), ranks, tuple(layers))


@st.composite
def held_by_ranks(draw: st.DrawFn, experts: int, ranks: int, size: int) -> list[list[int]]:
    """Experts of each rank: all of them present, `size` a rank, none twice on a rank."""
    order = draw(st.permutations(range(experts)))
    held = [list(order[rank::ranks]) for rank in range(ranks)]
    for rank in held:
        others = draw(st.permutations([e for e in range(experts) if e not in rank]))
        rank += others[: size - len(rank)]
    return held


@st.composite
def plans(draw: st.DrawFn, lowered: Precision | None = None) -> Plan:
    """Plans that every engine can run."""
    experts = draw(st.integers(1, 10))
    ranks = draw(st.integers(1, 4))
    size = draw(st.integers(-(-experts // ranks), experts))
    numbers = sorted(draw(st.sets(st.integers(0, 12), min_size=1, max_size=4)))
    layers = [layer_plan(n, draw(held_by_ranks(experts, ranks, size)), experts, lowered) for n in numbers]
    return plan_of(layers, ranks)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with a few of them changed, inserted, cut out or cut off."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(out) - 1)))
        match draw(st.sampled_from(("change", "insert", "remove", "truncate"))):
            case "change" if out:
                out[at] = draw(st.integers(0, 255))
            case "insert":
                out[at:at] = draw(st.binary(min_size=1, max_size=6))
            case "remove":
                del out[at : at + draw(st.integers(1, 8))]
            case _:
                del out[at:]
    return bytes(out)


def expected(plan: Plan) -> dict[int, list[list[int]]]:
    """Layer number -> experts of each rank, straight from the slots."""
    return {
        layer.layer: [[s.expert for s in layer.slots if s.rank == rank] for rank in range(plan.ranks)]
        for layer in plan.layers
    }


def unless_refused(read: Callable[[], T]) -> T | None:
    """What `read` returns, or None when it refuses; any other exception is the failure these tests look for."""
    try:
        return read()
    except InputError:
        return None
