"""Packing of slots on ranks for one load vector: heaviest first, then swaps on the busiest rank.

A layout is `table` int64 [G, C]: the expert in each of the C places of each of the G ranks. When E + R slots do not
fill every place, each rank has at most one empty place, held by a dummy expert with number E and no load, so that
ranks differ by one slot at most and a move into an empty place is a swap like any other. An expert stands on a rank
once: a second copy there would balance nothing.

Legend: G ranks, C places of a rank, E experts, x and y the experts to be swapped, a the busiest rank.
Cost: O(S log S) to pack, O(C^2 K + G) a swap with K the ranks looked at. Compiled.
"""

from __future__ import annotations

import heapq

import numpy as np

from equipoise.planning.kernels import compiled
from equipoise.types import FloatArray, IntArray

PARTNERS = 64
"""With more ranks than this, the busiest looks for a partner among so many of the least loaded."""

_STALE = 8
"""Swaps after which the partners are chosen afresh."""


@compiled
def rank_sums(table: IntArray, value: FloatArray) -> FloatArray:
    """Load of each rank, [G], from the load of one slot of each expert, [E + 1] (the dummy's is 0)."""
    out = np.zeros(table.shape[0])
    for g in range(table.shape[0]):
        for j in range(table.shape[1]):
            out[g] += value[table[g, j]]
    return out


@compiled
def holdings(table: IntArray, experts: int) -> IntArray:
    """How many slots of each expert (and of the dummy) each rank holds: int64 [G, E + 1]."""
    on = np.zeros((table.shape[0], experts + 1), dtype=np.int64)
    for g in range(table.shape[0]):
        for j in range(table.shape[1]):
            on[g, table[g, j]] += 1
    return on


@compiled
def pack(value: FloatArray, replicas: IntArray, ranks: int) -> IntArray:
    """Place slots, heaviest first, each on the least loaded rank that has room and does not hold its expert.

    Args:
        value: [E + 1] load of one slot of each expert; the last is the dummy's, 0.
        replicas: int64 [E] slots of each expert.
        ranks: G.

    Returns:
        int64 [G, C], C = ceil(slots / G). A second slot of an expert is put on a rank only where no other has room.
    """
    experts = replicas.shape[0]
    slots = replicas.sum()
    places = -(-slots // ranks)
    owner = np.empty(ranks * places, dtype=np.int64)
    at = 0
    for e in np.argsort(-value[:experts], kind="mergesort"):
        owner[at : at + replicas[e]] = e
        at += replicas[e]
    owner[at:] = experts
    table = np.full((ranks, places), -1, dtype=np.int64)
    used = np.zeros(ranks, dtype=np.int64)
    load = np.zeros(ranks)
    on = np.zeros((ranks, experts + 1), dtype=np.int64)
    # Dummies first: they decide which ranks have one slot less, and the heaviest slots then go there.
    for i in range(ranks * places - at):
        g = ranks - 1 - i
        table[g, 0] = experts
        used[g] = 1
        on[g, experts] = 1
    heap = [(0.0, g) for g in range(ranks) if used[g] < places]
    passed = [(0.0, 0) for _ in range(0)]
    for i in range(at):
        e = owner[i]
        best = -1
        while len(heap) > 0:
            top = heapq.heappop(heap)
            if on[top[1], e] == 0:
                best = top[1]
                break
            passed.append(top)
        if best < 0:  # every rank with room holds this expert already
            best = passed[0][1]
            passed.pop(0)
        while len(passed) > 0:
            heapq.heappush(heap, passed.pop())
        table[best, used[best]] = e
        used[best] += 1
        on[best, e] += 1
        load[best] += value[e]
        if used[best] < places:
            heapq.heappush(heap, (load[best], best))
    return table


@compiled
def separate(table: IntArray, value: FloatArray, experts: int) -> int:
    """Swap second copies of an expert off its rank where that is possible; returns how many are left."""
    ranks, places = table.shape
    on = holdings(table, experts)
    load = rank_sums(table, value)
    left = 0
    for a in range(ranks):
        for j in range(places):
            x = table[a, j]
            if on[a, x] < 2:
                continue
            best, at_b, at_k = np.inf, -1, -1
            for b in range(ranks):
                if b == a or on[b, x] > 0:
                    continue
                for k in range(places):
                    y = table[b, k]
                    if on[a, y] > 0:
                        continue
                    d = value[x] - value[y]
                    top = max(load[a] - d, load[b] + d)
                    if top < best:
                        best, at_b, at_k = top, b, k
            if at_b < 0:
                left += 1
                continue
            _swap(table, on, load, value, a, j, at_b, at_k)
    return left


@compiled
def _swap(table: IntArray, on: IntArray, load: FloatArray, value: FloatArray, a: int, j: int, b: int, k: int) -> None:
    """Exchange place j of rank a with place k of rank b."""
    x, y = table[a, j], table[b, k]
    table[a, j], table[b, k] = y, x
    on[a, x] -= 1
    on[a, y] += 1
    on[b, y] -= 1
    on[b, x] += 1
    load[a] += value[y] - value[x]
    load[b] += value[x] - value[y]


@compiled
def swap_down(table: IntArray, value: FloatArray, experts: int, target: float, most: int) -> float:
    """Swap slots of the busiest rank with others as long as the larger of the two ranks falls; in place.

    Args:
        table: [G, C] layout.
        value: [E + 1] load of one slot of each expert.
        experts: E.
        target: stop when no rank has more than this.
        most: at most so many swaps.

    Returns:
        Load of the busiest rank.
    """
    ranks, places = table.shape
    on = holdings(table, experts)
    load = rank_sums(table, value)
    many = min(PARTNERS, ranks)
    partners = np.arange(ranks)
    for step in range(most):
        a = int(load.argmax())
        high = load[a]
        if high <= target:
            break
        if ranks > many and step % _STALE == 0:
            partners = np.argsort(load, kind="mergesort")
        # A swap must lower the pair by more than rounding, or it could go on for ever.
        best, at_j, at_b, at_k = high * (1 - 1e-12), -1, -1, -1
        for j in range(places):
            x = table[a, j]
            for i in range(many):
                b = partners[i]
                # The best this rank can do is to meet the other half way.
                if b == a or on[b, x] > 0 or (high + load[b]) * 0.5 >= best:
                    continue
                for k in range(places):
                    d = value[x] - value[table[b, k]]
                    if d <= 0.0 or load[b] + d >= best or high - d >= best:
                        continue
                    if on[a, table[b, k]] == 0:
                        best, at_j, at_b, at_k = max(load[b] + d, high - d), j, b, k
        if at_j < 0:
            if many == ranks:
                break
            many = ranks  # none among the least loaded: look at all, once
            continue
        many = min(PARTNERS, ranks)
        _swap(table, on, load, value, a, at_j, at_b, at_k)
    return rank_sums(table, value).max()
