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
from equipoise.planning.search import iterate, objective, window_loads
from equipoise.planning.total import (
    GROUP_KICKS,
    KICK_TOLERANCE,
    SQUARINGS,
    TOLERANCE,
    WORK,
    bound_of,
    every,
    fill_counts,
    grouped,
    one,
    scaled_load,
)
from equipoise.types import FloatArray, IntArray


@dataclass(frozen=True)
class Layout:
    """Slots of one layer on ranks.

    Attributes:
        table: int64 [G, C] expert in each place of each rank; E stands for an empty place.
        replicas: int64 [E] slots of each expert.
        imbalance: mean over windows of max over mean of the ranks; 1 without load.
        shares: float64 [G, C], the part of its expert's tokens that each place takes; None: even.
    """

    table: IntArray
    replicas: IntArray
    imbalance: float
    shares: FloatArray | None = None

    def ranks_of(self, expert: int) -> list[int]:
        """Ranks that hold the expert, one entry a slot."""
        return sorted(np.nonzero(self.table == expert)[0].tolist())

    def share(self, expert: int, rank: int) -> float:
        """What part of the expert's tokens each of its slots on the rank takes."""
        if self.shares is None:
            return 1.0 / int(self.replicas[expert])
        return float(self.shares[rank][self.table[rank] == expert][0])


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
    return float(bound_of(np.ascontiguousarray(load, dtype=np.float64), slots, max(1, ranks)))


def place_total(
    load: FloatArray, slots: int, ranks: int, *, nodes: int = 1, groups: int = 1, seed: int = 0
) -> tuple[IntArray, IntArray, FloatArray]:
    """Place all layers of a model by their total load, in one compiled call.

    Args:
        load: [L, E] tokens.
        slots: E + R slots of a layer on all ranks together.
        ranks: G.
        nodes: N; with several, every group of experts is kept on one node (`place_grouped`).
        groups: of experts.
        seed: as in `place_layer`.

    Returns:
        Layouts int64 [L, G, C] (E stands for an empty place), slots of each expert int64 [L, E], and rank imbalance
        [L]: what `place_layer`, or `place_grouped`, gives layer by layer.

    Raises:
        InputError: fewer slots than experts, or parts that cannot be divided evenly.
    """
    rows = np.ascontiguousarray(load, dtype=np.float64)
    if slots < rows.shape[1]:
        raise InputError(f"{slots} slots are too few for {rows.shape[1]} experts")
    if nodes > 1:
        _require_divisible(rows.shape[1], slots, ranks, nodes, groups)
    return every(rows, slots, ranks, nodes, groups, TOLERANCE, seed)


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
    # One busy window (the others are empty): divided as the kernel divides, so that it gives the same to the last bit.
    pooled = scaled_load(windows.sum(0), ranks) if len(scaled) == 1 else np.ascontiguousarray(scaled.mean(0))
    replicas = fill_counts(pooled, slots, ranks) if start is None else start.astype(np.int64)
    if replicas.sum() < slots:  # more slots than experts times ranks: some must stand on a rank twice
        replicas = fill_counts(pooled, slots, ranks)
    if len(scaled) == 1:
        table, replicas, top = one(pooled, replicas, ranks, transfers, tolerance, at_least, most_kicks, seed)
        return Layout(table, replicas, float(top) if windows.any() else 1.0)
    each = np.append(pooled / replicas, 0.0)
    table = pack(each, replicas, ranks)
    separate(table, each, experts)
    least = max(1.0, at_least)
    swap_down(table, each, experts, least * (1 + 0.01 * tolerance), least * (1 + tolerance), 10 * slots)
    bound = max(rank_bound(pooled, slots, ranks), at_least)
    counted = np.append(replicas, 1)
    columns = np.ascontiguousarray(np.vstack([scaled.T, np.zeros(len(scaled))]))
    kicks = int(np.clip(WORK // (len(scaled) * slots * table.shape[1]), 2, most_kicks))
    near = bound * (1 + max(tolerance, KICK_TOLERANCE))
    top = float(iterate(table, counted, columns, SQUARINGS, transfers, kicks, near, seed + 1))
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
    _require_divisible(experts, slots, ranks, nodes, groups)
    if slots < experts:
        raise InputError(f"{slots} slots are too few for {experts} experts")
    if len(windows) == 1:
        row = np.ascontiguousarray(windows[0])
        return Layout(*grouped(row, slots, ranks, nodes, groups, transfers, tolerance, seed))
    size = experts // groups
    of_group = windows.reshape(len(windows), groups, size).sum(2)
    spread = place_layer(
        of_group, groups, nodes, transfers=False, tolerance=tolerance, most_kicks=GROUP_KICKS, seed=seed
    )
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
    return Layout(table, replicas, window_imbalance(table, replicas, windows))


def window_imbalance(table: IntArray, replicas: IntArray, windows: FloatArray) -> float:
    """Mean over windows of max over mean of the ranks, shares even; 1 without load.

    Args:
        table: int64 [G, C] layout.
        replicas: int64 [E] slots of each expert.
        windows: [W, E] tokens.
    """
    if not windows.any():
        return 1.0
    scaled = per_window(windows, len(table))
    columns = np.ascontiguousarray(np.vstack([scaled.T, np.zeros(len(scaled))]))
    return float(objective(window_loads(table, columns, np.append(replicas, 1))))


def _require_divisible(experts: int, slots: int, ranks: int, nodes: int, groups: int) -> None:
    """Refuse parts that cannot be divided evenly over groups and nodes."""
    for what, number, parts in (
        ("experts", experts, groups),
        ("groups", groups, nodes),
        ("slots", slots, nodes),
        ("ranks", ranks, nodes),
    ):
        if number % parts:
            raise InputError(f"group-limited placement: {number} {what} cannot be divided by {parts}")
