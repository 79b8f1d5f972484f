"""What one layer can do for a price a byte: the inner problem of the joint optimisation.

An option of a layer is (R, u): R replicas given by water-filling and u of the E + R slots at the lower precision.
With r[e] slots of expert e,

    bytes(R, u) = (E + R) * original - u * (original - low)
    value(R, u) = LIS(R) + slot_price * R + sum of the u smallest unit costs,   unit cost of e = cost[e] / r[e]

Every expert offers r[e] - 1 units freely and its last one (which leaves it without an original slot) only when it
is among the `most_low` experts with the smallest unit cost. Taking the smallest units first is optimal: the units
form a matroid (at most r[e] an expert, at most `most_low` last units). Given the LIS, no other replica counts do
better: a further slot of an expert costs at least the bytes of making one of its low slots original again, which
lowers the loss more.

Cost: O(E) for each R; experts are kept sorted by unit cost while replicas are added. Compiled.
"""

from __future__ import annotations

import numpy as np

from equipoise.planning.kernels import compiled
from equipoise.types import FloatArray, IntArray


@compiled
def _move_left(ranking: IntArray, key: FloatArray, expert: int) -> None:
    """Restore the order of `ranking` by (key, index) after the key of `expert` fell."""
    at = 0
    while ranking[at] != expert:
        at += 1
    while at > 0:
        left = ranking[at - 1]
        if key[left] < key[expert] or (key[left] == key[expert] and left < expert):
            break
        ranking[at] = left
        ranking[at - 1] = expert
        at -= 1


@compiled
def scan(
    order: IntArray,
    lis: FloatArray,
    allowed: np.ndarray,
    cost: FloatArray,
    most_low: int,
    original: int,
    saved: int,
    slot_price: float,
    byte_price: float,
    within: float,
    out_r: IntArray,
    out_u: IntArray,
    out_value: FloatArray,
) -> tuple[int, int, int, float]:
    """Best option at a price a byte; and every option within a distance of a given priced value.

    Args:
        order: [R] experts in the order in which they get replicas.
        lis: [R + 1] predicted LIS with so many replicas.
        allowed: bool [R + 1] numbers of replicas that may be chosen.
        cost: [E] cost of holding the expert at the lower precision only.
        most_low: at most so many experts without an original slot.
        original: bytes of a slot at the original precision.
        saved: bytes a low slot saves.
        slot_price: value of one replica.
        byte_price: value of one byte.
        within: options with value + byte_price * bytes <= within are written out, as many as the buffers hold.
        out_r: int64 [buffer] replicas of the options written.
        out_u: int64 [buffer] low slots.
        out_value: float64 [buffer] value without the price of bytes.

    Returns:
        options found within (may exceed the buffer), R and u of the best option, its priced value.
    """
    experts = cost.shape[0]
    r = np.ones(experts, dtype=np.int64)
    key = cost.copy()
    ranking = np.argsort(key, kind="mergesort")
    found = 0
    best_r = -1
    best_u = 0
    best = np.inf
    for spare in range(lis.shape[0]):
        if spare > 0:
            e = order[spare - 1]
            r[e] += 1
            key[e] = cost[e] / r[e]
            _move_left(ranking, key, e)
        if not allowed[spare]:
            continue
        value = lis[spare] + slot_price * spare
        size = (experts + spare) * original
        u = 0
        # The priced value is convex in u: it falls while a unit costs less than the bytes it saves.
        if value + byte_price * size <= within:
            if found < out_r.shape[0]:
                out_r[found], out_u[found], out_value[found] = spare, 0, value
            found += 1
        if value + byte_price * size < best:
            best_r, best_u, best = spare, 0, value + byte_price * size
        for i in range(experts):
            e = ranking[i]
            units = r[e] if i < most_low else r[e] - 1
            if key[e] > byte_price * saved and value + byte_price * (size - u * saved) > within:
                break
            for _ in range(units):
                u += 1
                value += key[e]
                priced = value + byte_price * (size - u * saved)
                if priced <= within:
                    if found < out_r.shape[0]:
                        out_r[found], out_u[found], out_value[found] = spare, u, value
                    found += 1
                if priced < best:
                    best_r, best_u, best = spare, u, priced
    return found, best_r, best_u, best


def slots_of(order: IntArray, spare: int, units: int, cost: FloatArray, most_low: int) -> tuple[IntArray, IntArray]:
    """The slots that an option stands for.

    Args:
        order: [R] experts in the order in which they get replicas.
        spare: replicas of the option.
        units: low slots of the option.
        cost: [E] cost of holding the expert at the lower precision only.
        most_low: at most so many experts without an original slot.

    Returns:
        replicas, low_slots: int64 [E].
    """
    replicas = 1 + np.bincount(order[:spare], minlength=len(cost)).astype(np.int64)
    return replicas, low_slots(replicas, units, cost, most_low)


def low_slots(replicas: IntArray, units: int, cost: FloatArray, most_low: int) -> IntArray:
    """Which slots to lower: the cheapest units; see the module.

    Args:
        replicas: int64 [E] slots of each expert.
        units: low slots of the layer.
        cost: [E] cost of holding the expert at the lower precision only.
        most_low: at most so many experts without an original slot.

    Returns:
        int64 [E] low slots of each expert.
    """
    ranking = np.argsort(cost / replicas, kind="stable")
    free = replicas[ranking] - 1
    free[:most_low] += 1
    low = np.zeros(len(cost), dtype=np.int64)
    low[ranking] = np.clip(units - (np.cumsum(free) - free), 0, free)
    return low
