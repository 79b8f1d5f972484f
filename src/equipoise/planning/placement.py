"""Slots of a layer on ranks: replica counts, packing, and a look back at both.

    1. replica counts by water-filling, at most one slot of an expert a rank (`replicas`);
    2. heaviest slots first onto the least loaded rank, then swaps on the busiest (`packing`);
    3. while the busiest rank is more than `TOLERANCE` above what no layout can beat: search over swaps and
       transfers of replicas together, then from disturbed copies (`search`).

With several windows of load the mean over windows of the busiest rank is minimised, so experts that are busy in the
same windows are kept apart. Hierarchical placement (node-limited routing): groups of experts are spread over nodes
first, then each node is a placement of its own, as DeepSeek's EPLB describes it.

Ranks hold equally many slots when they can, and differ by one otherwise. Pure functions; deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from equipoise.errors import InputError
from equipoise.planning.packing import pack, separate, swap_down
from equipoise.planning.replicas import replica_counts, water_fill
from equipoise.planning.search import iterate, objective, window_loads
from equipoise.types import FloatArray, IntArray

TOLERANCE = 1e-3
"""A layout this close to the bound is left alone: a thousandth is far below the noise of any stream."""

SQUARINGS = 4
"""The search's potential is a sum of 16th powers."""

KICK_TOLERANCE = 3e-3
"""Disturbed copies are tried only for a layout farther from the bound than this."""

WORK = 50_000
"""Disturbed copies tried are this divided by W S C, the size of a step of the search, at least 2."""


@dataclass(frozen=True)
class Layout:
    """Slots of one layer on ranks.

    Attributes:
        table: int64 [G, C] expert in each place of each rank; E stands for an empty place.
        replicas: int64 [E] slots of each expert.
        imbalance: mean over windows of max over mean of the ranks, shares even; 1 without load.
    """

    table: IntArray
    replicas: IntArray
    imbalance: float

    def ranks_of(self, expert: int) -> list[int]:
        """Ranks that hold the expert, one entry a slot."""
        return sorted(np.nonzero(self.table == expert)[0].tolist())


def rank_bound(load: FloatArray, slots: int, ranks: int) -> float:
    """What no even-share layout can beat: max over mean of the ranks for one load vector.

    The largest of
      1;
      the water-filling level v(R): no replica counts bring the heaviest slot below it;
      the heaviest slot together with the others that its rank must hold, C - 1 or more. If k of the R replicas
      lighten those, either the heaviest slot is at least v(R - k), and they weigh at least as much as the lightest
      experts do after the best use of k replicas; or one of them would itself reach v(R - k) unsplit, and weighs at
      least v(R - k) / (k + 1) beside v(R). The smallest over k is a bound.

    Args:
        load: [E] tokens.
        slots: E + R.
        ranks: G.
    """
    total = float(np.sum(load))
    if total == 0:
        return 1.0
    spare = slots - len(load)
    _, level = water_fill(load, spare, max(1, ranks))
    level = np.append(level, np.full(spare + 1 - len(level), level[-1]))
    beside = np.sort(load)[: max(0, min(slots // ranks, len(load)) - 1)].astype(np.float64)
    light = np.append(0.0, np.cumsum(_relief(beside, spare)))
    k = np.arange(spare + 1)
    least = level[::-1][k] + np.maximum(beside.sum() - light[k], 0.0)
    least[1:] = np.minimum(least[1:], level[spare] + level[::-1][k[1:]] / (k[1:] + 1))
    return max(1.0, float(max(least.min(), level[spare])) * ranks / total)


def _relief(load: FloatArray, spare: int) -> FloatArray:
    """How much the sum of single slots of these experts falls with each of `spare` replicas, largest falls first."""
    if not len(load):
        return np.zeros(spare)
    r = np.arange(1, spare + 1)
    falls = (load[:, None] / (r * (r + 1))).ravel()
    return -np.sort(-falls)[:spare]


def place_layer(
    load: FloatArray,
    slots: int,
    ranks: int,
    *,
    start: IntArray | None = None,
    transfers: bool = True,
    tolerance: float = TOLERANCE,
    at_least: float = 0.0,
    most_kicks: int = 200,
    seed: int = 0,
) -> Layout:
    """Place one layer.

    Args:
        load: [E] tokens of each expert, or [W, E] in several windows.
        slots: E + R slots on all ranks together.
        ranks: G.
        start: int64 [E] replica counts to start from (None: water-filling); they sum to `slots`.
        transfers: whether the search may change replica counts.
        tolerance: stop this close to the bound, as a fraction of it.
        at_least: an imbalance that is reached anyhow elsewhere, so that none below it is worth work.
        most_kicks: disturbed copies to try at most.
        seed: of the disturbances.

    Returns:
        The layout. An expert stands twice on a rank only if it has more slots than there are ranks.

    Raises:
        InputError: fewer slots than experts.
    """
    windows = np.atleast_2d(np.asarray(load, dtype=np.float64))
    experts = windows.shape[1]
    if slots < experts:
        raise InputError(f"{slots} slots are too few for {experts} experts")
    scaled = per_window(windows, ranks)
    pooled = np.ascontiguousarray(scaled.mean(0))
    replicas = replica_counts(pooled, slots - experts, ranks) if start is None else start.astype(np.int64)
    if replicas.sum() < slots:  # more slots than experts times ranks: some must stand on a rank twice
        replicas = replica_counts(pooled, slots - experts)
    each = np.append(pooled / replicas, 0.0)
    table = pack(each, replicas, ranks)
    separate(table, each, experts)
    # Swaps are cheap, so they go on for longer than makes a search worth while.
    bound, fine = max(1.0, at_least), 1 + 0.01 * tolerance
    top = swap_down(table, each, experts, bound * fine, 10 * slots)
    if len(scaled) == 1 and top <= bound * (1 + tolerance):
        return Layout(table, replicas, top if windows.any() else 1.0)
    bound = max(rank_bound(pooled, slots, ranks), at_least)
    counted = np.append(replicas, 1)
    columns = np.ascontiguousarray(np.vstack([scaled.T, np.zeros(len(scaled))]))
    if len(scaled) > 1 or top > bound * (1 + tolerance):
        kicks = int(np.clip(WORK // (len(scaled) * slots * table.shape[1]), 2, most_kicks))
        near = bound * (1 + max(tolerance, KICK_TOLERANCE))
        top = float(iterate(table, counted, columns, SQUARINGS, transfers, kicks, near, seed + 1))
        if len(scaled) == 1:
            each = np.append(pooled / counted[:-1], 0.0)
            top = swap_down(table, each, experts, bound * fine, 10 * slots)
    return Layout(table, counted[:-1], top if windows.any() else 1.0)


def per_window(windows: FloatArray, ranks: int) -> FloatArray:
    """Loads in units of the mean rank load of their window; windows without load are left out.

    Args:
        windows: [W, E] tokens.
        ranks: G.

    Returns:
        [W', E], W' at least 1; each row sums to G. A layer without any load is one even window.
    """
    total = windows.sum(1)
    busy = windows[total > 0] / total[total > 0, None] * ranks
    return busy if len(busy) else np.full((1, windows.shape[1]), ranks / windows.shape[1])


def place_grouped(
    load: FloatArray,
    slots: int,
    ranks: int,
    nodes: int,
    groups: int,
    *,
    transfers: bool = True,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Layout:
    """Place one layer with every group of experts on one node; rank r is on node r * nodes // ranks.

    Args:
        load: [E] or [W, E] tokens.
        slots: E + R on all ranks together.
        ranks: G, divisible by nodes.
        nodes: N.
        groups: consecutive groups of equal size into which the router divides the experts, divisible by nodes.
        transfers: as in `place_layer`.
        tolerance: as in `place_layer`.
        seed: as in `place_layer`.

    Raises:
        InputError: experts, slots or groups cannot be divided evenly.
    """
    windows = np.atleast_2d(np.asarray(load, dtype=np.float64))
    experts = windows.shape[1]
    for what, number, parts in (
        ("experts", experts, groups),
        ("groups", groups, nodes),
        ("slots", slots, nodes),
        ("ranks", ranks, nodes),
    ):
        if number % parts:
            raise InputError(f"group-limited placement: {number} {what} cannot be divided by {parts}")
    size = experts // groups
    of_group = windows.reshape(len(windows), groups, size).sum(2)
    spread = place_layer(of_group, groups, nodes, transfers=False, tolerance=tolerance, most_kicks=8, seed=seed)
    table = np.empty((ranks, -(-slots // ranks)), dtype=np.int64)
    replicas = np.empty(experts, dtype=np.int64)
    here = ranks // nodes
    # A lighter node need not be more even than brings its busiest rank to the heaviest node's mean.
    of_node = per_window(of_group, 1).mean(0)[spread.table].sum(1)
    for node in range(nodes):
        members = np.concatenate([np.arange(g * size, (g + 1) * size) for g in sorted(spread.table[node].tolist())])
        part = place_layer(
            windows[:, members],
            slots // nodes,
            here,
            transfers=transfers,
            tolerance=tolerance,
            at_least=float(of_node.max() / of_node[node]) if of_node[node] > 0 else np.inf,
            seed=seed,
        )
        table[node * here : (node + 1) * here] = np.append(members, experts)[part.table]
        replicas[members] = part.replicas
    scaled = per_window(windows, ranks)
    columns = np.ascontiguousarray(np.vstack([scaled.T, np.zeros(len(scaled))]))
    top = float(objective(window_loads(table, columns, np.append(replicas, 1))))
    return Layout(table, replicas, top if windows.any() else 1.0)
