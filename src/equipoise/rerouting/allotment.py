"""Which rule each layer gets when the layers together may spend so much: a multiple-choice knapsack.

    minimise sum_l lis[l, r_l]   subject to   sum_l cost[l, r_l] <= allowed

Solved by dynamic programming over layers and `BINS` equal parts of what is allowed, costs rounded up: never above it,
and at most L parts short of the optimum's spending. Prices (Lagrange multipliers) would only find the rules on the
convex hull of each layer, which with few layers leaves much of the bound unused.

L layers, R rules of a layer; rule 0 leaves the layer as it is and costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from equipoise.types import FloatArray, IntArray

BINS = 2000


def allot(lis: Sequence[FloatArray], cost: Sequence[FloatArray], allowed: float) -> IntArray:
    """The rule of each layer.

    Args:
        lis: [R_l] of each layer.
        cost: [R_l] of each layer, at least 0, 0 for rule 0.
        allowed: in the unit of the costs, at least 0; inf: the least LIS at any cost.

    Returns:
        int64 [L]; of equal sums the one that costs least.
    """
    if np.isinf(allowed):
        return np.array([np.lexsort((c, v))[0] for v, c in zip(lis, cost, strict=True)], dtype=np.int64)
    if allowed <= 0:
        return np.zeros(len(lis), dtype=np.int64)
    # value[b]: least sum of the layers so far when they spend exactly b parts or fewer.
    value = np.zeros(BINS + 1)
    taken = np.zeros((len(lis), BINS + 1), dtype=np.int64)
    parts = [np.ceil(c / allowed * BINS - 1e-9) for c in cost]
    for layer, (v, part) in enumerate(zip(lis, parts, strict=True)):
        now = np.full(BINS + 1, np.inf)
        for rule in np.argsort(part, kind="stable"):
            if part[rule] <= BINS:
                b = int(part[rule])
                other = value[: BINS + 1 - b] + v[rule]
                better = other < now[b:]
                now[b:][better] = other[better]
                taken[layer, b:][better] = rule
        value = now
    at = int(value.argmin())
    out = np.zeros(len(lis), dtype=np.int64)
    for layer in range(len(lis) - 1, -1, -1):
        out[layer] = taken[layer, at]
        at -= int(parts[layer][out[layer]])
    return out
