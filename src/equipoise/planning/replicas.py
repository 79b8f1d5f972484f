"""Replica counts that minimise the largest slot load: water-filling, exact.

    minimise  max_e n[e] / r[e]    subject to  sum_e r[e] = E + R,  r[e] >= 1

Giving one replica after another to the expert with the largest n/r is optimal for every R at once: to get below
a level c each expert needs at least ceil(n/c) slots whatever the others do, and the greedy never gives an expert
a further slot before its n/r is the level itself. So one run yields the whole curve "largest load against R".
Ties go to the expert with fewer slots, so a layer without load is filled evenly (not expert 0 R times).

Cost: O(E + R log E) a layer, compiled.
"""

from __future__ import annotations

import heapq

import numpy as np

from equipoise.planning.kernels import compiled
from equipoise.types import FloatArray, IntArray


@compiled
def fill(load: FloatArray, spare: int, most: int, order: IntArray, level: FloatArray) -> int:
    """Water-fill one layer; see `water_fill`. Writes `order` [spare] and `level` [spare + 1]; returns those given."""
    # A heap of (-n/r, r, e); an expert that may have no more slots leaves it, and its load stays a floor.
    heap = [(-load[e], 1, e) for e in range(load.shape[0])]
    heapq.heapify(heap)
    floor = 0.0
    for step in range(spare + 1):
        while len(heap) > 0 and heap[0][1] >= most:
            floor = max(floor, -heapq.heappop(heap)[0])
        level[step] = max(floor, -heap[0][0]) if len(heap) > 0 else floor
        if step == spare or len(heap) == 0:
            return step
        r, e = heap[0][1], heap[0][2]
        order[step] = e
        heapq.heapreplace(heap, (-load[e] / (r + 1), r + 1, e))
    return spare


def water_fill(load: FloatArray, spare: int, most: int | None = None) -> tuple[IntArray, FloatArray]:
    """The order in which experts get replicas, and the largest slot load after each.

    Args:
        load: [E] tokens of each expert.
        spare: R, replicas to give.
        most: no expert gets more than this many slots (None: no bound).

    Returns:
        order: int64 [R'] experts, R' = min(R, E * (most - 1)).
        level: float64 [R' + 1]; `level[j]` is the smallest possible largest slot load with j replicas.
    """
    order = np.empty(spare, dtype=np.int64)
    level = np.empty(spare + 1, dtype=np.float64)
    given = fill(np.ascontiguousarray(load, dtype=np.float64), spare, most or spare + 2, order, level)
    return order[:given], level[: given + 1]


def replica_counts(load: FloatArray, spare: int, most: int | None = None) -> IntArray:
    """Slots of each expert with `spare` replicas in each layer, the largest slot load as small as possible.

    Args:
        load: [..., E] tokens of each expert.
        spare: R, replicas of each layer.
        most: no expert gets more than this many slots (None: no bound).

    Returns:
        int64 [..., E], at least 1; sums to E + R (less when `most` leaves no room).
    """
    rows = np.asarray(load, dtype=np.float64)
    flat = rows.reshape(-1, rows.shape[-1])
    out = np.ones(flat.shape, dtype=np.int64)
    for l, row in enumerate(flat):  # noqa: E741
        order, _ = water_fill(row, spare, most)
        out[l] += np.bincount(order, minlength=flat.shape[1])
    return out.reshape(rows.shape)
