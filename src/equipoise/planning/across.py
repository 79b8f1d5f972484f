"""Replicas spread over layers under a total of bytes, precisions untouched: exact for the sum and for the max of LIS.

    minimise  sum_l LIS_l   or   max_l LIS_l    subject to  sum_l (E + R_l) * bytes_l <= limit

The max is a threshold: to bring layer l to a LIS of c takes a known least number of replicas, so the smallest c that
fits is found by bisection over the finitely many values that LIS can take. The sum is a knapsack over layers
(`knapsack`), exact up to 8 layers; with more the returned bound says how far from the optimum it can be at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from equipoise.errors import InputError
from equipoise.planning.knapsack import LayerProblem, choose
from equipoise.planning.replicas import water_fill
from equipoise.types import FloatArray, IntArray


@dataclass(frozen=True)
class Spread:
    """Replicas of all layers.

    Attributes:
        replicas: int64 [L, E] slots of each expert.
        value: sum or max of LIS.
        bound: no spread within the limit has a smaller value.
    """

    replicas: IntArray
    value: float
    bound: float


def spread_replicas(
    load: FloatArray, slot_bytes: IntArray, limit: int, objective: Literal["sum", "max"] = "sum"
) -> Spread:
    """Replica counts of all layers.

    Args:
        load: [L, E] tokens of each expert.
        slot_bytes: int64 [L] bytes of a slot of each layer.
        limit: bytes of all slots together.
        objective: `sum` or `max` of LIS over layers.

    Raises:
        InputError: the limit is below one slot an expert, or the objective is unknown.
    """
    rows = np.asarray(load, dtype=np.float64)
    experts = rows.shape[1]
    base = experts * int(np.sum(slot_bytes))
    if limit < base:
        raise InputError(f"{limit:,} bytes cannot hold one slot an expert, which takes {base:,}")
    orders, curves = [], []
    for n, size in zip(rows, slot_bytes.tolist(), strict=True):
        spare = min((limit - base) // int(size), 64 * experts) if n.any() else 0
        order, level = water_fill(n, int(spare))
        orders.append(order)
        curves.append(level * (experts / n.sum()) if n.any() else np.ones(1))
    if objective == "max":
        given = _threshold(curves, slot_bytes, limit - base)
        value = bound = float(max(c[r] for c, r in zip(curves, given, strict=True)))
    elif objective == "sum":
        parts = zip(orders, curves, slot_bytes.tolist(), strict=True)
        choice = choose([_problem(order, curve, size, experts) for order, curve, size in parts], limit)
        if choice is None:
            raise AssertionError("one slot an expert fits, so a spread exists")
        given, value, bound = choice.spare.tolist(), choice.value, choice.bound
    else:
        raise InputError(f"objective {objective!r} is neither sum nor max")
    replicas = np.stack([1 + np.bincount(o[:r], minlength=experts) for o, r in zip(orders, given, strict=True)])
    return Spread(replicas.astype(np.int64), value, bound)


def _threshold(curves: list[FloatArray], slot_bytes: IntArray, room: int) -> list[int]:
    """Replicas of each layer that bring the largest LIS to the smallest value that fits."""
    levels = np.unique(np.concatenate(curves))

    def needed(level: float) -> list[int] | None:
        # Curves never rise, so the first replica count at or below the level is the least one.
        found = [int(np.searchsorted(-c, -level * (1 + 1e-12))) for c in curves]
        return None if any(r == len(c) for r, c in zip(found, curves, strict=True)) else found

    low, high, best = 0, len(levels) - 1, [0] * len(curves)
    while low <= high:
        middle = (low + high) // 2
        found = needed(float(levels[middle]))
        if found is not None and sum(r * b for r, b in zip(found, slot_bytes.tolist(), strict=True)) <= room:
            best, high = found, middle - 1
        else:
            low = middle + 1
    return best


def _problem(order: IntArray, curve: FloatArray, size: int, experts: int) -> LayerProblem:
    """A layer without a lower precision: nothing is saved, so no slot is ever lowered."""
    return LayerProblem(
        order=order,
        lis=curve,
        allowed=np.ones(len(curve), dtype=bool),
        cost=np.ones(experts),
        most_low=0,
        original=size,
        saved=0,
        slot_price=0.0,
    )
