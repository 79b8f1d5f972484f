"""Packing of slots on ranks for one load vector: heaviest first, then swaps on the busiest rank.

A layout is `table` int64 [G, C]: the expert in each of the C places of each of the G ranks. When E + R slots do not
fill every place, each rank has at most one empty place, held by a dummy expert with number E and no load, so that
ranks differ by one slot at most and a move into an empty place is a swap like any other. An expert stands on a rank
once: a second copy there would balance nothing.

Legend: G ranks, C places of a rank, E experts, x and y the experts to be swapped, a the busiest rank.
Cost: O(S log S) to pack; a swap O(C^2 K + log G) with K the ranks looked at, and their weights side by side. Nothing of
the size G x E is kept: whether a rank holds an expert is read from its C places, only for a swap that would be the
best so far, and only for experts with several slots. Compiled.
"""

from __future__ import annotations

import heapq

import numpy as np

from equipoise.planning.kernels import compiled
from equipoise.types import FloatArray, IntArray

PARTNERS = 64
"""With more ranks than this, the busiest looks for a partner among so many of the least loaded."""

_STALE = 8
"""Swaps after which the partners are chosen afresh; with many ranks a `_STALE_SHARE` of them, so that choosing costs
O(1) a swap."""

_STALE_SHARE = 16


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
def holds(table: IntArray, rank: int, expert: int) -> bool:
    """Whether the rank has a slot of the expert (or dummy)."""
    found = False
    for j in range(table.shape[1]):
        found = found or table[rank, j] == expert
    return found


@compiled
def slots_of(table: IntArray, experts: int) -> IntArray:
    """Slots of each expert, and how many dummies there are: int64 [E + 1]."""
    out = np.zeros(experts + 1, dtype=np.int64)
    for g in range(table.shape[0]):
        for j in range(table.shape[1]):
            out[table[g, j]] += 1
    return out


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
    # Dummies first: they decide which ranks have one slot less, and the heaviest slots then go there.
    for i in range(ranks * places - at):
        g = ranks - 1 - i
        table[g, 0] = experts
        used[g] = 1
    heap = [(0.0, g) for g in range(ranks) if used[g] < places]
    passed = [(0.0, 0) for _ in range(0)]
    for i in range(at):
        e = owner[i]
        best = -1
        while len(heap) > 0:
            top = heapq.heappop(heap)
            if replicas[e] == 1 or not holds(table, top[1], e):
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
        load[best] += value[e]
        if used[best] < places:
            heapq.heappush(heap, (load[best], best))
    return table


@compiled
def separate(table: IntArray, value: FloatArray, experts: int) -> int:
    """Swap second copies of an expert off its rank where that is possible; returns how many are left."""
    ranks, places = table.shape
    count = slots_of(table, experts)
    load = rank_sums(table, value)
    left = 0
    for a in range(ranks):
        for j in range(places):
            x = table[a, j]
            if count[x] < 2:
                continue
            here = 0
            for k in range(places):
                here += table[a, k] == x
            if here < 2:
                continue
            best, at_b, at_k = np.inf, -1, -1
            for b in range(ranks):
                if b == a or holds(table, b, x):
                    continue
                for k in range(places):
                    y = table[b, k]
                    if count[y] > 1 and holds(table, a, y):
                        continue
                    d = value[x] - value[y]
                    top = max(load[a] - d, load[b] + d)
                    if top < best:
                        best, at_b, at_k = top, b, k
            if at_b < 0:
                left += 1
                continue
            _swap(table, load, value, a, j, at_b, at_k)
    return left


@compiled
def _swap(table: IntArray, load: FloatArray, value: FloatArray, a: int, j: int, b: int, k: int) -> None:
    """Exchange place j of rank a with place k of rank b."""
    x, y = table[a, j], table[b, k]
    table[a, j], table[b, k] = y, x
    load[a] += value[y] - value[x]
    load[b] += value[x] - value[y]


@compiled
def _least_first(load: FloatArray, many: int) -> IntArray:
    """Ranks, the `many` least loaded first and in order; the others follow as they stand: O(G + many log many)."""
    ranks = load.shape[0]
    if many >= ranks:
        return np.argsort(load, kind="mergesort")
    limit = np.partition(load, many - 1)[many - 1]
    out, near, far = np.empty(ranks, dtype=np.int64), 0, ranks
    for g in range(ranks):
        if load[g] < limit:
            out[near] = g
            near += 1
        elif load[g] > limit:
            far -= 1
            out[far] = g
    # Those at the limit stand between, some of them among the least loaded.
    for g in range(ranks):
        if load[g] == limit:
            out[near] = g
            near += 1
    least = out[:many].copy()
    out[:many] = least[np.argsort(load[least], kind="mergesort")]
    return out


@compiled
def swap_down(table: IntArray, value: FloatArray, experts: int, target: float, enough: float, most: int) -> float:
    """Swap slots of the busiest rank with others as long as the larger of the two ranks falls; in place.

    Args:
        table: [G, C] layout.
        value: [E + 1] load of one slot of each expert.
        experts: E.
        target: stop when no rank has more than this.
        enough: with more ranks than `PARTNERS`, those beyond are looked at only while the busiest has more than this.
            Close to the bound most swaps are found nowhere but there, and each such look costs O(C^2 G).
        most: at most so many swaps.

    Returns:
        Load of the busiest rank.
    """
    ranks, places = table.shape
    load = rank_sums(table, value)
    if load.max() <= target:
        return load.max()
    count = slots_of(table, experts)
    # Loads of the slots where they stand, so that a pair of ranks is compared without looking up experts.
    weight = np.empty((ranks, places))
    for g in range(ranks):
        for j in range(places):
            weight[g, j] = value[table[g, j]]
    many = min(PARTNERS, ranks)
    stale = max(_STALE, ranks // _STALE_SHARE)
    # The busiest rank is the top of a heap of (-load, rank); entries whose load has changed since are dropped.
    heap = [(-load[g], g) for g in range(ranks)]
    heapq.heapify(heap)
    partners = _least_first(load, many)
    since = 0
    for _ in range(most):
        while -heap[0][0] != load[heap[0][1]]:
            heapq.heappop(heap)
        a = heap[0][1]
        high = load[a]
        if high <= target:
            break
        if since >= stale:
            partners = _least_first(load, many)
            since = 0
        # A swap must lower the pair by more than rounding, or it could go on for ever.
        best, at_j, at_b, at_k = high * (1 - 1e-12), -1, -1, -1
        for i in range(many):
            b = partners[i]
            low = load[b]
            # The best this rank can do is to meet the other half way; a swap is as good as it comes near to that.
            middle, half = (high + low) * 0.5, (high - low) * 0.5
            if b == a or middle >= best:
                continue
            room = (best - middle) * (1 + 1e-9)
            for j in range(places):
                want = weight[a, j] - half
                for k in range(places):
                    if abs(want - weight[b, k]) >= room:
                        continue
                    d = weight[a, j] - weight[b, k]
                    top = max(low + d, high - d)
                    x, y = table[a, j], table[b, k]
                    if (
                        d > 0.0
                        and top < best
                        and (count[x] == 1 or not holds(table, b, x))
                        and (count[y] == 1 or not holds(table, a, y))
                    ):
                        best, at_j, at_b, at_k = top, j, b, k
                        room = (best - middle) * (1 + 1e-9)
        if at_j < 0:
            if many == ranks or high <= enough:
                break
            many = ranks  # none among the least loaded: look at all, once
            continue
        many = min(PARTNERS, ranks)
        _swap(table, load, value, a, at_j, at_b, at_k)
        weight[a, at_j], weight[at_b, at_k] = weight[at_b, at_k], weight[a, at_j]
        heapq.heappush(heap, (-load[a], a))
        heapq.heappush(heap, (-load[at_b], at_b))
        since += 1
    return rank_sums(table, value).max()
