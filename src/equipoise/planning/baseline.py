"""EPLB's plan of one layer, slot for slot: what a robust plan is measured against, and what is kept without evidence.

    published  the plan as it is; `merged` then lets no expert stand twice on a rank
    parted     the plan for an even split: second slots of an expert are swapped off its rank where that is possible;
               where EPLB gives an expert more slots than there are ranks, replicas and packing are those of `total`

DeepSeek's EPLB in its global mode (github.com/deepseek-ai/EPLB), as its description has it:

    replicas   each further slot to the expert with the largest load / slots, the first of equals
    packing    slots heaviest first, equals in the order in which they were made (experts 0..E-1, then replicas),
               each on the least loaded rank that has room, the first of equals

Ties fall as EPLB's do: the published layout is equal place by place. Cost: O(R E + S G) a layer. Compiled.
"""

from __future__ import annotations

import numpy as np

from equipoise.planning.kernels import compiled
from equipoise.planning.packing import pack, separate
from equipoise.planning.total import fill_counts
from equipoise.types import FloatArray, IntArray


@compiled
def replicate(load: FloatArray, slots: int) -> IntArray:
    """Expert of each slot in the order in which EPLB makes them: int64 [S], experts 0..E-1 and then the replicas."""
    experts = load.shape[0]
    owner = np.empty(slots, dtype=np.int64)
    owner[:experts] = np.arange(experts)
    count = np.ones(experts, dtype=np.int64)
    for s in range(experts, slots):
        best = 0
        for e in range(1, experts):
            if load[e] / count[e] > load[best] / count[best]:
                best = e
        owner[s] = best
        count[best] += 1
    return owner


@compiled
def pack_in_order(weight: FloatArray, ranks: int) -> IntArray:
    """Slot in each place of each rank, int64 [G, C], from the load of each slot [S], S divisible by G."""
    slots = weight.shape[0]
    places = slots // ranks
    out = np.empty((ranks, places), dtype=np.int64)
    if places == 1:
        out[:, 0] = np.arange(slots)
        return out
    load, used = np.zeros(ranks), np.zeros(ranks, dtype=np.int64)
    for s in np.argsort(-weight, kind="mergesort"):
        best = -1
        for g in range(ranks):
            if used[g] < places and (best < 0 or load[g] < load[best]):
                best = g
        out[best, used[best]] = s
        used[best] += 1
        load[best] += weight[s]
    return out


@compiled
def published(load: FloatArray, slots: int, ranks: int) -> tuple[IntArray, IntArray]:
    """EPLB's layout of one layer, which may hold an expert on a rank more than once.

    Args:
        load: [E] tokens of each expert.
        slots: E + R on all ranks together, divisible by them: EPLB has no plan otherwise.
        ranks: G.

    Returns:
        Layout int64 [G, C] and slots of each expert int64 [E].
    """
    owner = replicate(load, slots)
    counts = np.zeros(load.shape[0], dtype=np.int64)
    for e in owner:
        counts[e] += 1
    at = pack_in_order((load / counts)[owner], ranks)
    table = np.empty_like(at)
    for g in range(ranks):
        for j in range(at.shape[1]):
            table[g, j] = owner[at[g, j]]
    return table, counts


@compiled
def parted(load: FloatArray, slots: int, ranks: int) -> tuple[IntArray, IntArray]:
    """EPLB's layout of one layer, changed where an expert stands on a rank twice; see the module.

    Args:
        load: as in `published`.
        slots: as in `published`.
        ranks: G.

    Returns:
        As `published`.
    """
    experts = load.shape[0]
    table, counts = published(load, slots, ranks)
    each = np.zeros(experts + 1)
    # More slots than ranks for one expert while others could have them would waste slots.
    if counts.max() > ranks and slots <= experts * ranks:
        counts = fill_counts(load, slots, ranks)
        each[:experts] = load / counts
        table = pack(each, counts, ranks)
    else:
        each[:experts] = load / counts
    separate(table, each, experts)
    return table, counts
