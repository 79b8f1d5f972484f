"""EPLB's plan with its double slots merged: the same load on every rank, and no expert twice on one.

EPLB may put several of an expert's c slots on one rank. The second balances nothing that the first does not, and no
engine gains from it; but to move it elsewhere makes another plan, which held out can be worse than EPLB's. So the slots
stay where they are and their shares move: where expert e has m of its c slots on rank g,

    share[e, g] = m / c     on one slot; m - 1 places of the rank come free

and every rank carries what EPLB gave it, on any load. A free place is taken by a *standby*: a slot, with share 0, of
the expert with the most load a slot among those that the rank lacks. It takes no tokens, as EPLB's second slot gained
none, but it is there for whoever moves tokens later (a streaming balancer, an engine that splits evenly). Where a rank
has more places than there are experts, what cannot be filled stays double, and the copies share evenly.

Giving the standbys tokens of the busiest rank instead was tried: docs/experiments.md. Cost: O(S log C) a layer, and
O(E) for each free place.
"""

from __future__ import annotations

import numpy as np

from equipoise.types import FloatArray, IntArray


def merge(table: IntArray, load: FloatArray) -> tuple[IntArray, IntArray, FloatArray]:
    """Merge the double slots of one layer, each expert's shares even before.

    Args:
        table: int64 [G, C] expert in each place of each rank; every place is taken, every expert has one.
        load: [E] tokens of each expert, by which standbys are chosen.

    Returns:
        The layout int64 [G, C], slots of each expert int64 [E] (standbys included), and the share of its expert that
        each place takes, float64 [G, C].
    """
    table = table.copy()
    slots = np.bincount(table.ravel(), minlength=len(load))
    shares = 1.0 / slots[table]
    ordered = np.sort(table, axis=1)
    for g in np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(1)):
        row, share = table[g], shares[g]
        for e in np.unique(row):
            first, *rest = np.flatnonzero(row == e)
            for j in rest:
                lacking = np.ones(len(load), dtype=bool)
                lacking[row] = False
                if not lacking.any():
                    break
                slots[e] -= 1
                row[j] = np.where(lacking, load / slots, -1.0).argmax()
                slots[row[j]] += 1
                share[first] += share[j]
                share[j] = 0.0
            same = row == e
            share[same] = share[same].sum() / same.sum()
    return table, slots.astype(np.int64), shares
