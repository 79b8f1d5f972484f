import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import InputError
from equipoise.metrics import max_over_mean
from equipoise.planning.churn import moved_slots, rename, stay
from equipoise.planning.packing import holdings
from equipoise.planning.placement import place_grouped, place_layer, place_total, rank_bound
from equipoise.planning.shares import best_shares
from equipoise.types import LayerPlan, Slot

spec = importlib.util.spec_from_file_location("eplb", Path(__file__).parents[2] / "benchmarks" / "planner" / "eplb.py")
eplb = importlib.util.module_from_spec(spec)
spec.loader.exec_module(eplb)


def imbalance(table, load):
    """Max over mean of the ranks, recounted from the table."""
    n = np.asarray(load, dtype=float)
    count = np.bincount(table.ravel(), minlength=len(n) + 1)[: len(n)]
    each = np.append(n / count, 0.0)
    return float(max_over_mean(each[table].sum(1)))


def layer_of(layout, number=0):
    experts = len(layout.replicas)
    slots = [Slot(e, "original", g, 1.0 / layout.replicas[e]) for e in range(experts) for g in layout.ranks_of(e)]
    return LayerPlan(number, "", experts, tuple(slots))


def test_eplb_here_gives_the_example_of_its_readme():
    weight = np.array(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ]
    )
    table, counts = eplb.rebalance(weight, 16, 4, 2, 8)
    assert table.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert counts.sum(1).tolist() == [16, 16]


def test_the_case_that_two_stages_cannot_solve():
    load = np.array([600, 560, 120, 120, 20, 10, 10, 10])
    layout = place_layer(load, 16, 8)
    assert imbalance(layout.table, load) * load.sum() / 8 <= 196.67
    table, _ = eplb.rebalance(load[None], 16, 1, 1, 8)
    assert imbalance(table.reshape(8, 2), load) * load.sum() / 8 == pytest.approx(232)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 3, 17, 250, 10**12]), min_size=1, max_size=12),
    st.integers(0, 12),
    st.integers(1, 9),
    st.integers(1, 3),
)
def test_every_slot_is_placed_once_and_ranks_differ_by_one_at_most(load, spare, ranks, windows):
    experts, slots = len(load), len(load) + spare
    if slots < ranks:
        return
    rows = np.array([np.roll(load, w) for w in range(windows)], dtype=float)
    layout = place_layer(rows, slots, ranks)
    held = (layout.table < experts).sum(1)
    assert held.sum() == slots
    assert held.max() - held.min() <= 1
    assert np.array_equal(np.bincount(layout.table.ravel(), minlength=experts + 1)[:experts], layout.replicas)
    assert layout.replicas.min() >= 1
    if slots <= experts * ranks:
        assert holdings(layout.table, experts)[:, :experts].max() <= 1
    if windows == 1:
        assert layout.imbalance == pytest.approx(imbalance(layout.table, load))
        assert layout.imbalance >= rank_bound(np.array(load), slots, ranks) - 1e-9


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 1000), min_size=4, max_size=24),
    st.sampled_from([2, 3, 4]),
    st.integers(0, 2),
)
def test_never_worse_than_eplb_in_sample(load, ranks, more):
    n = np.array(load, dtype=float)
    slots = (-(-len(n) // ranks) + more) * ranks
    table, _ = eplb.rebalance(n[None], slots, 1, 1, ranks)
    layout = place_layer(n, slots, ranks)
    rows = [row[row >= 0].tolist() for row in table.reshape(ranks, -1)]
    if any(len(set(row)) < len(row) for row in rows):
        return  # It left a place unused by putting an expert on one rank twice, which this planner never does.
    # Within the tolerance at which the search stops.
    assert imbalance(layout.table, n) <= max(
        imbalance(table.reshape(ranks, -1), n), rank_bound(n, slots, ranks) * 1.001
    ) * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=4, max_size=6))
def test_small_placements_without_replicas_are_optimal(load):
    n = np.array(load, dtype=float)
    if len(n) % 2:
        return
    half = len(n) // 2
    best = min(
        max(n[list(c)].sum(), n.sum() - n[list(c)].sum()) for c in itertools.combinations(range(len(n)), half)
    ) / (n.sum() / 2)
    assert place_layer(n, len(n), 2).imbalance <= best * 1.003 + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=4), st.integers(0, 2), st.sampled_from([2, 3]))
def test_no_layout_at_all_beats_the_bound(load, spare, ranks):
    n, slots = np.array(load, dtype=float), len(load) + spare
    if slots % ranks or not n.any():
        return
    best = np.inf
    for owners in itertools.product(range(len(n)), repeat=slots):
        if len(set(owners)) == len(n):
            best = min(best, imbalance(np.array(owners).reshape(ranks, -1), n))
            rows = [owners[i : i + slots // ranks] for i in range(0, slots, slots // ranks)]
            if all(len(set(row)) == len(row) for row in rows):
                assert imbalance(np.array(rows), n) >= rank_bound(n, slots, ranks) - 1e-9
    layout = place_layer(n, slots, ranks)
    assert layout.imbalance >= best - 1e-9


def test_windows_keep_experts_apart_that_are_busy_together():
    # Experts 0 and 1 are busy in the first window, 2 and 3 in the second; the total cannot tell them apart.
    windows = np.array([[9, 9, 1, 1], [1, 1, 9, 9]], dtype=float)
    layout = place_layer(windows, 4, 2)
    assert layout.imbalance == pytest.approx(1.0)
    assert not set(layout.ranks_of(0)) & set(layout.ranks_of(1))


def test_groups_stay_on_their_node():
    rng = np.random.default_rng(0)
    load = rng.lognormal(size=24)
    layout = place_grouped(load, 32, 8, 2, 4)
    for e in range(24):
        assert len({g // 4 for g in layout.ranks_of(e)}) == 1
    nodes = [{layout.ranks_of(e)[0] // 4 for e in range(g * 6, g * 6 + 6)} for g in range(4)]
    assert all(len(node) == 1 for node in nodes)
    assert (layout.table.reshape(2, -1) < 24).sum(1).tolist() == [16, 16]
    with pytest.raises(InputError, match="24 experts cannot be divided by 5"):
        place_grouped(load, 32, 8, 2, 5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=4, max_size=10), st.integers(0, 6), st.integers(2, 4))
def test_best_shares_are_shares_and_never_worse_than_even(load, spare, ranks):
    n = np.array(load, dtype=float)
    layout = place_layer(n, len(n) + spare, ranks)
    layer = layer_of(layout)
    expert, rank = np.array([s.expert for s in layer.slots]), np.array([s.rank for s in layer.slots])
    scaled = n[None] / n.sum() * ranks
    shares = best_shares(scaled, expert, rank, ranks)
    assert shares.min() > 0
    assert np.bincount(expert, weights=shares) == pytest.approx(np.ones(len(n)))
    even = np.bincount(rank, weights=scaled[0, expert] / layout.replicas[expert], minlength=ranks).max()
    split = np.bincount(rank, weights=scaled[0, expert] * shares, minlength=ranks).max()
    assert split <= even * (1 + 1e-6)


def test_unequal_shares_reach_what_even_ones_cannot():
    # One expert on both ranks, another on one: even shares give 1.0 : 0.5, the best split is even ranks.
    shares = best_shares(np.array([[1.0, 1.0 / 3]]), np.array([0, 0, 1]), np.array([0, 1, 1]), 2)
    assert shares == pytest.approx([2 / 3, 1 / 3, 1.0], abs=1e-6)


def test_an_unchanged_load_moves_nothing():
    rng = np.random.default_rng(1)
    load = rng.lognormal(size=32)
    layout = place_layer(load, 40, 8)
    layer = layer_of(layout)
    kept = stay(layout, layer, load, 1, True, False)
    assert moved_slots(kept.table, layer) == 0
    shuffled = layout.table[rng.permutation(8)]
    assert moved_slots(shuffled, layer) > 0
    assert moved_slots(shuffled[rename(shuffled, layer, 1)], layer) == 0


def test_a_small_change_of_load_moves_few_slots_and_stays_balanced():
    rng = np.random.default_rng(2)
    load = rng.lognormal(size=64)
    layer = layer_of(place_layer(load, 80, 8))
    changed = load * rng.uniform(0.9, 1.1, 64)
    fresh = place_layer(changed, 80, 8)
    kept = stay(fresh, layer, changed, 1, True, False)
    assert kept.imbalance <= fresh.imbalance * 1.006
    assert moved_slots(kept.table, layer) < 0.25 * moved_slots(fresh.table[rename(fresh.table, layer, 1)], layer)


def test_deterministic():
    load = np.random.default_rng(3).lognormal(size=(3, 40))
    assert np.array_equal(place_layer(load, 48, 8).table, place_layer(load, 48, 8).table)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 8, 16]), st.booleans())
def test_all_layers_in_one_call_are_the_layers_one_by_one(seed, spare, on_nodes):
    load = np.random.default_rng(seed).lognormal(sigma=1.5, size=(3, 16))
    load[1] = 0
    nodes, groups = (2, 4) if on_nodes else (1, 1)
    tables, counts, tops = place_total(load, 16 + spare, 8, nodes=nodes, groups=groups)
    for n, table, r, top in zip(load, tables, counts, tops, strict=True):
        one = place_grouped(n, 16 + spare, 8, 2, 4) if on_nodes else place_layer(n, 16 + spare, 8)
        assert np.array_equal(one.table, table)
        assert np.array_equal(one.replicas, r)
        assert one.imbalance == pytest.approx(top)
        assert top == pytest.approx(imbalance(table, n))


def test_nodes_are_never_worse_than_eplb_on_nodes():
    load = np.random.default_rng(5).lognormal(size=(12, 64))
    theirs, _ = eplb.rebalance(load, 96, 8, 4, 16)
    ours, _, _ = place_total(load, 96, 16, nodes=4, groups=8)
    for n, a, b in zip(load, ours, theirs.reshape(12, 16, -1), strict=True):
        assert imbalance(a, n) <= imbalance(b, n) * 1.001


def test_a_total_that_cannot_be_placed_is_refused():
    with pytest.raises(InputError, match="15 slots are too few for 16 experts"):
        place_total(np.ones((2, 16)), 15, 4)
    with pytest.raises(InputError, match="16 experts cannot be divided by 5"):
        place_total(np.ones((2, 16)), 16, 4, nodes=2, groups=5)
