"""Few moves: a new placement named and chosen so that most slots stay where an old plan has them.

Two candidates are weighed. The *fresh* layout, its ranks renamed so that as many slots as possible stay (ranks are
interchangeable, within a node when placement is group-limited; a linear assignment problem). And the *warm* one: the
old layout, improved move by move only until it is as good as the fresh one to within `CHURN_TOLERANCE`. The one
with fewer moves wins among those within the tolerance.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from equipoise.errors import InputError
from equipoise.planning.placement import SQUARINGS, Layout, per_window
from equipoise.planning.search import objective, search, window_loads
from equipoise.types import FloatArray, IntArray, LayerPlan, Plan, Profile

CHURN_TOLERANCE = 5e-3
"""Imbalance given up, relative, for a layout that moves fewer slots."""


def require_same_cluster(old: Plan, profile: Profile, ranks: int) -> None:
    """Refuse an old plan of another model or number of ranks.

    Raises:
        InputError: naming what differs.
    """
    layers = [int(number) for number in profile.layer_ids]
    if [layer.layer for layer in old.layers] != layers or old.model.num_experts != profile.num_experts:
        raise InputError("the old plan has other layers or experts than this profile: give a plan of the same model")
    if old.ranks != ranks:
        raise InputError(f"the old plan is for {old.ranks} ranks, this one for {ranks}: moves cannot be counted")


def old_table(layer: LayerPlan, ranks: int, places: int) -> IntArray | None:
    """Layout of an old plan's layer as int64 [G, C]; None when a rank holds more than C slots, or less than C - 1."""
    held: list[list[int]] = [[] for _ in range(ranks)]
    for slot in layer.slots:
        held[slot.rank].append(slot.expert)
    if any(not places - 1 <= len(row) <= places for row in held):
        return None
    return np.array([row + [layer.num_experts] * (places - len(row)) for row in held], dtype=np.int64)


def rename(table: IntArray, layer: LayerPlan, nodes: int) -> IntArray:
    """How to permute the ranks of a layout, and whole nodes, so that most slots stand where the old plan has them.

    Args:
        table: int64 [G, C].
        layer: of the old plan.
        nodes: ranks move within a node only, and nodes as a whole (1: freely).

    Returns:
        int64 [G], for each rank the one of the layout whose slots it gets.
    """
    ranks, experts = len(table), layer.num_experts
    before = np.zeros((ranks, experts + 1))
    for slot in layer.slots:
        before[slot.rank, slot.expert] = 1
    now = np.zeros((ranks, experts + 1))
    np.add.at(now, (np.arange(ranks)[:, None], table), 1)
    now[:, experts] = 0
    same = np.minimum(now, 1) @ before.T  # [new rank, old rank] slots that stay
    here = ranks // nodes
    blocks = same.reshape(nodes, here, nodes, here)
    gain = np.empty((nodes, nodes))
    place = {}
    for a in range(nodes):
        for b in range(nodes):
            rows, columns = linear_sum_assignment(blocks[a, :, b, :], maximize=True)
            gain[a, b] = blocks[a, rows, b, columns].sum()
            place[a, b] = columns
    order = np.empty(ranks, dtype=np.int64)
    for a, b in zip(*(x.tolist() for x in linear_sum_assignment(gain, maximize=True)), strict=True):
        order[b * here + place[a, b]] = np.arange(a * here, (a + 1) * here)
    return order


def stay(layout: Layout, layer: LayerPlan, load: FloatArray, nodes: int, transfers: bool, grouped: bool) -> Layout:
    """The layout with the fewest moves from an old layer among those about as good as a fresh one.

    Args:
        layout: the fresh one.
        layer: of the old plan.
        load: [W, E] tokens.
        nodes: as in `rename`.
        transfers: whether the search may change replica counts.
        grouped: experts of a group stay on a node, so slots cannot move freely: only ranks are renamed.
    """
    ranks, places = layout.table.shape
    order = rename(layout.table, layer, nodes)
    shares = None if layout.shares is None else layout.shares[order]
    fresh = Layout(layout.table[order], layout.replicas, layout.imbalance, shares)
    if moved_slots(fresh.table, layer) == 0:
        return fresh
    # The warm one shares evenly: slots in place that do not are judged as if they did.
    table = None if grouped else old_table(layer, ranks, places)
    if table is None or len(layer.slots) != int(layout.replicas.sum()):
        return fresh
    counted = np.append(layer.replicas(), 1)
    if not transfers and (counted[:-1] != layout.replicas).any():
        return fresh
    scaled = per_window(np.atleast_2d(np.asarray(load, dtype=np.float64)), ranks)
    columns = np.ascontiguousarray(np.vstack([scaled.T, np.zeros(len(scaled))]))
    enough = layout.imbalance * (1 + CHURN_TOLERANCE)
    while objective(window_loads(table, columns, counted)) > enough:
        if search(table, counted, columns, SQUARINGS, transfers, 1, enough) == 0:
            break
    warm = Layout(table, counted[:-1], float(objective(window_loads(table, columns, counted))))
    good = warm.imbalance <= enough
    return warm if good and moved_slots(warm.table, layer) <= moved_slots(fresh.table, layer) else fresh


def moved_slots(table: IntArray, layer: LayerPlan) -> int:
    """Slots of a layout that the old plan does not have on that rank."""
    before = {(slot.rank, slot.expert) for slot in layer.slots}
    now = {(g, int(e)) for g, row in enumerate(table) for e in row if e < layer.num_experts}
    return len(now - before)


def moved_bytes(new: Plan, old: Plan, original: IntArray, low: IntArray) -> int:
    """Bytes of the slots (expert, precision, rank) of a plan that an old one does not have.

    Args:
        new: the plan.
        old: what is in place.
        original: int64 [L, E] bytes of a slot at the original precision.
        low: int64 [L, E] at the lower one.
    """
    total = 0
    for i, (layer, before) in enumerate(zip(new.layers, old.layers, strict=True)):
        held = {(s.expert, s.precision, s.rank) for s in before.slots}
        for s in {(s.expert, s.precision, s.rank) for s in layer.slots} - held:
            total += int(original[i, s[0]] if s[1] == "original" else low[i, s[0]])
    return total
