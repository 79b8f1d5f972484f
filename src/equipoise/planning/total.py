"""Layers placed by their total load in one compiled call: arrays in, arrays out.

What `placement` does for one load vector, without a step through Python between layers, nodes or stages:
water-filling, packing, swaps, and the search where those stay above the bound. `placement.place_layer` with one
window is this kernel, so both give the same layout.

    one      a layer on ranks
    grouped  a layer with its groups of experts on nodes first, then every node as a placement of its own
    every    all layers of a model

Legend: L layers, E experts, G ranks, C places of a rank, N nodes. Cost: O(S log S) a layer to fill and pack, about two
swaps a rank whatever its size (`packing`), and the search where it is needed. Compiled into one: after a change of
`packing`, `replicas` or `search` this file must change too, since the compiler's cache looks at no other.
"""

from __future__ import annotations

import numpy as np

from equipoise.planning.kernels import compiled
from equipoise.planning.packing import pack, separate, swap_down
from equipoise.planning.replicas import fill
from equipoise.planning.search import iterate
from equipoise.types import FloatArray, IntArray

TOLERANCE = 1e-3
"""A layout this close to the bound is left alone: a thousandth is far below the noise of any stream."""

SQUARINGS = 4
"""The search's potential is a sum of 16th powers."""

KICK_TOLERANCE = 3e-3
"""Disturbed copies are tried only for a layout farther from the bound than this."""

WORK = 50_000
"""Disturbed copies tried are this divided by W S C, the size of a step of the search, at least 2."""

GROUP_KICKS = 8
"""Disturbed copies tried at most when groups are spread over nodes."""


@compiled
def bound_of(load: FloatArray, slots: int, ranks: int) -> float:
    """See `placement.rank_bound`."""
    total = load.sum()
    if total == 0.0:
        return 1.0
    experts = load.shape[0]
    spare = slots - experts
    order, level = np.empty(spare, dtype=np.int64), np.empty(spare + 1)
    given = fill(load, spare, max(1, ranks), order, level)
    level[given + 1 :] = level[given]
    beside = np.sort(load)[: max(0, min(slots // ranks, experts) - 1)]
    # How much the sum of these slots falls with each replica that goes to them, largest falls first.
    falls = np.empty(len(beside) * spare)
    for i in range(len(beside)):
        for r in range(spare):
            falls[i * spare + r] = beside[i] / ((r + 1) * (r + 2))
    falls = np.sort(falls)[::-1]
    weight, light, least = beside.sum(), 0.0, level[spare]
    for k in range(spare + 1):
        if 0 < k <= len(falls):
            light += falls[k - 1]
        here = level[spare - k] + max(weight - light, 0.0)
        if k > 0:
            here = min(here, level[spare] + level[spare - k] / (k + 1))
        least = here if k == 0 else min(least, here)
    return max(1.0, max(least, level[spare]) * ranks / total)


@compiled
def fill_counts(load: FloatArray, slots: int, ranks: int) -> IntArray:
    """Slots of each expert by water-filling, at most one a rank while there is room: int64 [E], sums to `slots`."""
    experts = load.shape[0]
    spare = slots - experts
    order, level = np.empty(spare, dtype=np.int64), np.empty(spare + 1)
    most = ranks if slots <= experts * ranks else spare + 2
    given = fill(load, spare, most, order, level)
    counts = np.ones(experts, dtype=np.int64)
    for i in range(given):
        counts[order[i]] += 1
    return counts


@compiled
def one(
    load: FloatArray,
    counts: IntArray,
    ranks: int,
    transfers: bool,
    tolerance: float,
    at_least: float,
    most_kicks: int,
    seed: int,
) -> tuple[IntArray, IntArray, float]:
    """Place one layer by one load vector.

    Args:
        load: [E] in units of the mean rank load (they sum to G).
        counts: int64 [E] slots of each expert to start from.
        ranks: G.
        transfers: whether the search may change replica counts.
        tolerance: as in `placement.place_layer`.
        at_least: as there.
        most_kicks: as there.
        seed: as there.

    Returns:
        Layout int64 [G, C], slots of each expert int64 [E], and the busiest rank's load.
    """
    experts, slots = load.shape[0], counts.sum()
    each = np.zeros(experts + 1)
    each[:experts] = load / counts
    table = pack(each, counts, ranks)
    places = table.shape[1]
    separate(table, each, experts)
    # Swaps are cheap, so they go on for longer than makes a search worth while.
    bound, fine = max(1.0, at_least), 1 + 0.01 * tolerance
    top = swap_down(table, each, experts, bound * fine, bound * (1 + tolerance), 10 * slots)
    # One or two single slots a rank: the heaviest beside the lightest, as packed, is the optimum.
    if top <= bound * (1 + tolerance) or (slots == experts and slots == ranks * places and places <= 2):
        return table, counts, top
    bound = max(bound_of(load, slots, ranks), at_least)
    if top <= bound * (1 + tolerance):
        return table, counts, top
    counted = np.ones(experts + 1, dtype=np.int64)
    counted[:experts] = counts
    column = np.zeros((experts + 1, 1))
    column[:experts, 0] = load
    kicks = min(max(WORK // (slots * places), 2), most_kicks)
    near = bound * (1 + max(tolerance, KICK_TOLERANCE))
    iterate(table, counted, column, SQUARINGS, transfers, kicks, near, seed + 1)
    each[:experts] = load / counted[:experts]
    top = swap_down(table, each, experts, bound * fine, bound * (1 + tolerance), 10 * slots)
    return table, counted[:experts], top


@compiled
def scaled_load(load: FloatArray, ranks: int) -> FloatArray:
    """In units of the mean rank load; a layer without load counts as even."""
    total = load.sum()
    if total > 0.0:
        return load / total * ranks
    return np.full(load.shape[0], ranks / load.shape[0])


@compiled
def grouped(
    load: FloatArray, slots: int, ranks: int, nodes: int, groups: int, transfers: bool, tolerance: float, seed: int
) -> tuple[IntArray, IntArray, float]:
    """Place one layer with every group of experts on one node; see `placement.place_grouped`.

    Args:
        load: [E] tokens.
        slots: on all ranks.
        ranks: G.
        nodes: N.
        groups: divisible by N, and E by it.
        transfers: as in `one`.
        tolerance: as in `one`.
        seed: as in `one`.
    """
    experts = load.shape[0]
    size, here, mine = experts // groups, ranks // nodes, groups // nodes
    of_group = np.zeros(groups)
    for e in range(experts):
        of_group[e // size] += load[e]
    single = np.ones(groups, dtype=np.int64)
    spread, _, _ = one(scaled_load(of_group, nodes), single, nodes, False, tolerance, 0.0, GROUP_KICKS, seed)
    of_node = np.zeros(nodes)
    for node in range(nodes):
        for g in spread[node]:
            of_node[node] += of_group[g]
    table = np.empty((ranks, -(-slots // ranks)), dtype=np.int64)
    counts = np.empty(experts, dtype=np.int64)
    members, part = np.empty(mine * size, dtype=np.int64), np.empty(mine * size)
    top = 0.0
    for node in range(nodes):
        at = 0
        for g in np.sort(spread[node]):
            for e in range(g * size, (g + 1) * size):
                members[at], part[at] = e, load[e]
                at += 1
        # A lighter node need not be more even than brings its busiest rank to the heaviest node's mean.
        at_least = of_node.max() / of_node[node] if of_node[node] > 0.0 else np.inf
        scaled = scaled_load(part, here)
        start = fill_counts(scaled, slots // nodes, here)
        local, r, busiest = one(scaled, start, here, transfers, tolerance, at_least, 200, seed)
        for i in range(here):
            for j in range(local.shape[1]):
                e = local[i, j]
                table[node * here + i, j] = members[e] if e < len(members) else experts
        for i in range(len(members)):
            counts[members[i]] = r[i]
        top = max(top, busiest * of_node[node])
    total = of_node.sum()
    return table, counts, top * nodes / total if total > 0.0 else 1.0


@compiled
def every(
    load: FloatArray, slots: int, ranks: int, nodes: int, groups: int, tolerance: float, seed: int
) -> tuple[IntArray, IntArray, FloatArray]:
    """Place all layers.

    Args:
        load: [L, E] tokens.
        slots: of a layer on all ranks together.
        ranks: G.
        nodes: N; 1 for placement without groups.
        groups: of experts; 1 for placement without groups.
        tolerance: as in `one`.
        seed: as in `one`.

    Returns:
        Layouts int64 [L, G, C] (E stands for an empty place), slots of each expert int64 [L, E], and rank
        imbalance [L].
    """
    layers, experts = load.shape
    tables = np.empty((layers, ranks, -(-slots // ranks)), dtype=np.int64)
    counts = np.empty((layers, experts), dtype=np.int64)
    tops = np.ones(layers)
    for i in range(layers):
        if nodes > 1:
            table, r, top = grouped(load[i], slots, ranks, nodes, groups, True, tolerance, seed)
        else:
            scaled = scaled_load(load[i], ranks)
            start = fill_counts(scaled, slots, ranks)
            table, r, top = one(scaled, start, ranks, True, tolerance, 0.0, 200, seed)
        tables[i], counts[i] = table, r
        if load[i].any():
            tops[i] = top
    return tables, counts, tops
