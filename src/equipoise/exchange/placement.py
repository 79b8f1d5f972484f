"""From a plan to `physical_to_logical` [L, P], checked for what no engine checks itself.

The engines run one replica count in all layers, the same number of slots on every rank, one precision a layer
and an even split between replicas. What a plan asks beyond that is refused with the reason, or, where the user
says so, dropped and counted (`placement_only`) or filled up (`pad`).

`pad` fills short ranks with further replicas: each time of the expert with the most load a slot (`n / r`, the
step of optimal water-filling) that some short rank lacks, on the least loaded such rank. It costs the memory of
the added slots, beyond the plan's budget: the engine allocates equal ranks in any case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from equipoise.errors import InputError
from equipoise.types import IntArray, LayerPlan, Plan, Profile


@dataclass(frozen=True)
class Placement:
    """Which expert sits in which slot of which rank.

    Attributes:
        experts: int64 [L, P] logical expert of each physical expert; rank r owns columns [r*P/G, (r+1)*P/G).
        layer_ids: the model's own number of each layer, L of them.
        num_experts: E.
        ranks: G.
        lost_precisions: slots whose lower precision was dropped.
        lost_shares: slots whose unequal share was dropped.
        added: slots added to make ranks and layers equal.
    """

    experts: IntArray
    layer_ids: tuple[int, ...]
    num_experts: int
    ranks: int
    lost_precisions: int = 0
    lost_shares: int = 0
    added: int = 0

    @property
    def slots(self) -> int:
        """P, slots of a layer on all ranks together."""
        return int(self.experts.shape[1])

    @property
    def redundant(self) -> int:
        """Spare slots of a layer: P - E."""
        return self.slots - self.num_experts


def from_plan(plan: Plan, engine: str, ep_size: int | None, placement_only: bool, pad: Profile | None) -> Placement:
    """Take the placement out of a plan.

    Args:
        plan: the plan, its slots placed on `plan.ranks` ranks.
        engine: name, for the messages.
        ep_size: expert-parallel size of the engine; None is the plan's.
        placement_only: drop precisions and unequal shares instead of refusing.
        pad: loads to fill short ranks by; None refuses them.

    Raises:
        InputError: the engine cannot honour the plan, with the reason.
    """
    if ep_size is not None and ep_size != plan.ranks:
        raise InputError(
            f"the plan places its slots on {plan.ranks} ranks, --ep-size asks for {ep_size}: "
            f"make it with `equipoise plan PROFILE --ranks {ep_size}`"
        )
    lowered = {layer.layer: sum(s.precision != "original" for s in layer.slots) for layer in plan.layers}
    uneven = {layer.layer: _uneven(layer) for layer in plan.layers}
    if not placement_only:
        _refuse_losses(plan, engine, lowered, uneven)
    held = [_by_rank(layer, plan.ranks, engine) for layer in plan.layers]
    size = max(len(rank) for layer in held for rank in layer)
    short = sum(size - len(rank) for layer in held for rank in layer)
    if short:
        if pad is None:
            raise InputError(_unequal(plan, held, engine))
        _check_pad(plan, pad)
        for experts, counts in zip(held, pad.counts, strict=True):
            _fill(experts, counts, size)
    return check_placement(
        Placement(
            experts=np.array([[e for rank in layer for e in rank] for layer in held], dtype=np.int64),
            layer_ids=tuple(layer.layer for layer in plan.layers),
            num_experts=plan.model.num_experts,
            ranks=plan.ranks,
            lost_precisions=sum(lowered.values()),
            lost_shares=sum(uneven.values()),
            added=short,
        )
    )


def check_placement(placement: Placement) -> Placement:
    """Check what the engines do not: whole rows, known experts, all of them present, none twice on a rank.

    Raises:
        InputError: naming the layer and what is wrong with it.
    """
    if len(set(placement.layer_ids)) != len(placement.layer_ids):
        twice = next(n for n in placement.layer_ids if placement.layer_ids.count(n) > 1)
        raise InputError(f"layer {twice} stands twice: the engines count the layers of one stack (a decoder) only")
    if placement.slots % placement.ranks:
        raise InputError(f"{placement.slots} slots a layer do not divide by {placement.ranks} ranks")
    every = set(range(placement.num_experts))
    for layer, row in zip(placement.layer_ids, placement.experts.tolist(), strict=True):
        if strange := set(row) - every:
            raise InputError(f"layer {layer}: expert {min(strange)} is out of range 0..{placement.num_experts - 1}")
        if missing := every - set(row):
            raise InputError(f"layer {layer}: expert {min(missing)} has no slot")
        size = placement.slots // placement.ranks
        for rank in range(placement.ranks):
            own = row[rank * size : (rank + 1) * size]
            if len(set(own)) != len(own):
                raise InputError(f"layer {layer}: rank {rank} holds an expert twice")
    return placement


def _uneven(layer: LayerPlan) -> int:
    """Slots that do not take the even share of their expert."""
    even = 1.0 / layer.replicas()
    return sum(not math.isclose(s.share, even[s.expert], abs_tol=1e-6) for s in layer.slots)


def _refuse_losses(plan: Plan, engine: str, lowered: Mapping[int, int], uneven: Mapping[int, int]) -> None:
    """Refuse a plan whose precisions or shares the engine would not run."""
    for layer in plan.layers:
        if lowered[layer.layer]:
            kinds = "/".join(sorted({s.precision for s in layer.slots if s.precision != "original"}))
            raise InputError(
                f"layer {layer.layer} has {lowered[layer.layer]} of {len(layer.slots)} slots in {kinds}: {engine} runs "
                f"one precision a layer and its file carries the placement alone; --placement-only exports just that"
            )
        if uneven[layer.layer]:
            raise InputError(
                f"layer {layer.layer} has {uneven[layer.layer]} slots with unequal shares: {engine} splits an expert's "
                f"tokens evenly over its slots; plan with --shares even for that, or --placement-only exports this "
                f"placement without the shares"
            )


def _by_rank(layer: LayerPlan, ranks: int, engine: str) -> list[list[int]]:
    """The experts of each rank, in the plan's order."""
    held: list[list[int]] = [[] for _ in range(ranks)]
    for slot in layer.slots:
        if slot.expert in held[slot.rank]:
            cost = "collapses the copies into one" if engine == "vllm-ascend" else "gains nothing from the second"
            more = "more ranks" if ranks > 1 else "--ranks G"
            raise InputError(
                f"layer {layer.layer}: rank {slot.rank} holds expert {slot.expert} twice and {engine} {cost}; "
                f"plan with {more} or fewer replicas, so that the slots of an expert are on different ranks"
            )
        held[slot.rank].append(slot.expert)
    return held


def _unequal(plan: Plan, held: Sequence[Sequence[Sequence[int]]], engine: str) -> str:
    """Why the slots are not equal, and what to do."""
    fix = "plan with --slots S and --ranks G, or fill up with --pad PROFILE"
    for layer, ranks in zip(plan.layers, held, strict=True):
        sizes = [len(rank) for rank in ranks]
        if min(sizes) != max(sizes):
            return (
                f"layer {layer.layer}: rank {sizes.index(max(sizes))} holds {max(sizes)} slots and rank "
                f"{sizes.index(min(sizes))} holds {min(sizes)}, {engine} gives every rank the same number; {fix}"
            )
    sizes = [sum(len(rank) for rank in ranks) for ranks in held]
    most, least = sizes.index(max(sizes)), sizes.index(min(sizes))
    return (
        f"layer {plan.layers[most].layer} has {sizes[most]} slots and layer {plan.layers[least].layer} has "
        f"{sizes[least]}, {engine} has one number of replicas for all layers; {fix}"
    )


def _check_pad(plan: Plan, pad: Profile) -> None:
    """Refuse loads of another model."""
    want = ([layer.layer for layer in plan.layers], plan.model.num_experts)
    have = (pad.layer_ids.tolist(), pad.num_experts)
    if want != have:
        raise InputError(
            f"the --pad profile is of another model: {len(have[0])} layers x {have[1]} experts, "
            f"the plan has {len(want[0])} x {want[1]} (or their layer numbers differ)"
        )


def _fill(held: list[list[int]], counts: IntArray, size: int) -> None:
    """Fill every rank to `size` slots with further replicas.

    Args:
        held: experts of each rank; grows in place, without duplicates on a rank.
        counts: [E] selections of each expert.
        size: slots of a rank, at most E.
    """
    replicas = np.bincount([e for rank in held for e in rank], minlength=len(counts))
    for _ in range(sum(size - len(rank) for rank in held)):
        short = [rank for rank in held if len(rank) < size]
        a_slot = counts / replicas
        # Every short rank lacks some expert (size <= E, no duplicates), so one is always found.
        expert = next(e for e in np.argsort(-a_slot, kind="stable") if any(e not in rank for rank in short))
        open_ranks = [rank for rank in short if expert not in rank]
        min(open_ranks, key=lambda rank: float(a_slot[rank].sum())).append(int(expert))
        replicas[expert] += 1
