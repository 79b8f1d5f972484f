"""Unequal shares: the split of each expert's tokens between its slots that makes the busiest rank least.

For a given placement a linear program (HiGHS through scipy) over x[s], the share of slot s:

    minimise  mean_w t[w]  +  EVEN * sum_s load[e(s)] * |x[s] - 1 / (slots of e)| / G
    subject to  sum over slots s of expert e of x[s] = 1,   x[s] >= LEAST / (slots of e)
                sum over slots s on rank g of x[s] * load[w, e(s)] <= t[w]   for every rank g and window w

It is what LPLB solves for each batch, solved once for a stream. An engine that picks replicas evenly cannot honour
it; the runtime here can. Slots of an expert with one slot are constants and leave the program.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

from equipoise.types import FloatArray, IntArray

EVEN = 0.01
"""How much leaving the even split costs: of many splits with the same busiest rank, nearly the most even is taken."""

LEAST = 0.05
"""No slot gets less than this part of an even share: a replica that is paid for is used."""


def best_shares(load: FloatArray, expert: IntArray, rank: IntArray, ranks: int) -> FloatArray:
    """Shares of the slots of one layer.

    Args:
        load: [W, E] tokens in each window, in units of the mean rank load of the window.
        expert: int64 [S] expert of each slot.
        rank: int64 [S] rank of each slot.
        ranks: G.

    Returns:
        float64 [S], positive; the shares of an expert sum to 1.
    """
    windows, experts = load.shape
    count = np.bincount(expert, minlength=experts)
    shares = 1.0 / count[expert]
    free = np.flatnonzero(count[expert] > 1)
    if not len(free):
        return shares
    fixed = np.zeros((windows, ranks))
    for s in np.flatnonzero(count[expert] == 1):
        fixed[:, rank[s]] += load[:, expert[s]]
    several, number = np.unique(expert[free], return_inverse=True)
    slots, at = len(free), np.arange(len(free))
    even = shares[free]
    # Columns: shares, distances from even, busiest rank of each window.
    columns = 2 * slots + windows
    sums = sparse.csr_matrix((np.ones(slots), (number, at)), shape=(len(several), columns))
    rows = (np.arange(windows)[:, None] * ranks + rank[free]).ravel()
    limits = sparse.csr_matrix(
        (load[:, expert[free]].ravel(), (rows, np.tile(at, windows))), shape=(windows * ranks, columns)
    ) - sparse.csr_matrix(
        (np.ones(windows * ranks), (np.arange(windows * ranks), 2 * slots + np.arange(windows).repeat(ranks))),
        shape=(windows * ranks, columns),
    )
    one = sparse.identity(slots, format="csr")
    none = sparse.csr_matrix((slots, windows))
    above, below = sparse.hstack([one, -one, none]), sparse.hstack([-one, -one, none])
    weight = EVEN * load.mean(0)[expert[free]] / ranks
    program: dict[str, Any] = {
        "c": np.concatenate([np.zeros(slots), weight, np.full(windows, 1.0 / windows)]),
        "A_ub": sparse.vstack([limits, above, below]),
        "b_ub": np.concatenate([-fixed.ravel(), even, -even]),
        "A_eq": sums,
        "b_eq": np.ones(len(several)),
        "bounds": [(LEAST * x, 1.0) for x in even] + [(0.0, None)] * (slots + windows),
    }
    found: Any = linprog(**program, method="highs")
    if not found.success:
        raise RuntimeError(f"the linear program of the shares failed: {found.message}")
    x = np.maximum(found.x[:slots], LEAST * even)
    total = np.bincount(expert[free], weights=x, minlength=experts)
    shares[free] = x / total[expert[free]]
    return shares
