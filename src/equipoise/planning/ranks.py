"""A whole model on ranks: every layer placed, precisions spread so that ranks hold about equal bytes, shares set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from equipoise.errors import InputError
from equipoise.options import PlanOptions
from equipoise.planning.churn import stay
from equipoise.planning.guard import baseline, layers_won
from equipoise.planning.placement import Layout, per_window, place_grouped, place_layer
from equipoise.planning.shares import best_shares
from equipoise.planning.sizes import Sizes
from equipoise.types import FloatArray, IntArray, Plan, Slot


def place_model(
    load: Sequence[FloatArray],
    replicas: IntArray,
    options: PlanOptions,
    *,
    transfers: bool,
    previous: Plan | None,
    measured: tuple[FloatArray, FloatArray] | None = None,
) -> list[Layout]:
    """Place every layer.

    Args:
        load: of each layer [W, E] tokens or fractions in each window.
        replicas: int64 [L, E] slots of each expert.
        options: ranks, nodes, group-limited, groups, guard and shares.
        transfers: whether replica counts may change (their sum a layer stays).
        previous: a plan whose slots should stay where they are as far as possible.
        measured: tokens [L, E] in total and [W, L, E] in windows, for the guard (`guard`); None: it is not asked.

    Raises:
        InputError: fewer slots than ranks, or groups that cannot be divided.
    """
    layouts = []
    groups = options.groups or options.nodes
    merged = options.shares == "merged"
    by_windows = np.ones(len(load), dtype=bool)
    if measured is not None and transfers and not options.group_limited:
        by_windows = layers_won(measured[1], replicas.sum(1), options.ranks, options.guard, options.seed, merged=merged)
    for i, rows in enumerate(load):
        slots = int(replicas[i].sum())
        if slots < options.ranks:
            raise InputError(f"{slots} slots a layer cannot fill {options.ranks} ranks: give fewer ranks or more slots")
        if options.group_limited:
            layout = place_grouped(
                rows, slots, options.ranks, options.nodes, groups, transfers=transfers, seed=options.seed
            )
        elif measured is not None and not by_windows[i]:
            layout = baseline(measured[0][i], rows, slots, options.ranks, merged=merged)
        else:
            layout = place_layer(rows, slots, options.ranks, start=replicas[i], transfers=transfers, seed=options.seed)
        if previous is not None:
            nodes = options.nodes if options.group_limited else 1
            layout = stay(layout, previous.layers[i], rows, nodes, transfers, options.group_limited)
        layouts.append(layout)
    return layouts


def ranked_slots(
    layouts: list[Layout],
    low: IntArray,
    sizes: Sizes,
    load: Sequence[FloatArray],
    options: PlanOptions,
    previous: Plan | None,
) -> list[tuple[Slot, ...]]:
    """Slots with rank, precision and share, sorted by expert, original precision first.

    Which of an expert's ranks get its low slots is free: those where it takes the least of its tokens do, then the
    ones that hold it so already (in `previous`), then those with the most bytes so far, over all layers, so that
    ranks end up with about equal memory.

    Args:
        layouts: of each layer.
        low: int64 [L, E] low slots of each expert.
        sizes: bytes of slots.
        load: as in `place_model`, for unequal shares.
        options: ranks, and how slots share an expert's tokens.
        previous: what is in place.
    """
    held = [0] * options.ranks
    out = []
    for i, layout in enumerate(layouts):
        before = set()
        if previous is not None:
            before = {(s.expert, s.rank) for s in previous.layers[i].slots if s.precision != "original"}
        placed: list[tuple[int, bool, int, float]] = []
        for e, r in enumerate(layout.replicas.tolist()):
            q = int(low[i, e])
            ranks = layout.ranks_of(e)
            share = {g: layout.share(e, g) for g in ranks}
            ranks.sort(key=lambda g: (share[g], (e, g) not in before, -held[g], g))
            for at, g in enumerate(ranks):
                lowered = at < q
                held[g] += int(sizes.low[i, e] if lowered else sizes.original[i, e])
                placed.append((e, lowered, g, share[g]))
            if len(ranks) != r:
                raise AssertionError(f"layer {i}: expert {e} has {len(ranks)} places for {r} slots")
        placed.sort()
        shares = [row[3] for row in placed]
        if options.shares == "lp" and options.ranks > 1:
            expert = np.array([row[0] for row in placed], dtype=np.int64)
            rank = np.array([row[2] for row in placed], dtype=np.int64)
            shares = best_shares(per_window(load[i], options.ranks), expert, rank, options.ranks).tolist()
        names = ("original", sizes.low_name)
        out.append(tuple(Slot(e, names[b], g, x) for (e, b, g, _), x in zip(placed, shares, strict=True)))  # type: ignore[arg-type]
    return out
