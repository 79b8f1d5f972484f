import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_joint_plan import profile_of

from equipoise.errors import InputError
from equipoise.metrics import rank_load, slot_load
from equipoise.planning import plan
from equipoise.planning.baseline import parted, published
from equipoise.planning.guard import LEAST, convinced, layers_won, left_out
from equipoise.planning.merged import merge
from equipoise.planning.packing import holdings
from equipoise.scoring import score

spec = importlib.util.spec_from_file_location("eplb", Path(__file__).parents[2] / "benchmarks" / "planner" / "eplb.py")
theirs_in_python = importlib.util.module_from_spec(spec)
spec.loader.exec_module(theirs_in_python)


def table_of(layer, ranks):
    """Experts of each rank, sorted."""
    return [sorted(s.expert for s in layer.slots if s.rank == g) for g in range(ranks)]


def alternating(seed, layers=4, steps=12, experts=32):
    """Profile and later part of a stream in which other experts are busy in every second window."""
    rng = np.random.default_rng(seed)
    kinds = rng.dirichlet(np.full(experts, 0.3), (2, layers))
    series = np.array([[rng.multinomial(4000, p) for p in kinds[w % 2]] for w in range(2 * steps)])
    return tuple(profile_of(part.sum(0), series=part) for part in (series[:steps], series[steps:]))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 17, 17, 250, 10**9]), min_size=2, max_size=16),
    st.integers(1, 6),
    st.integers(0, 3),
)
def test_the_baseline_is_eplb_place_by_place_where_that_is_legal(load, ranks, more):
    n = np.array(load, dtype=float)
    slots = (-(-len(n) // ranks) + more) * ranks
    theirs = theirs_in_python.rebalance(n[None], slots, 1, 1, ranks)[0][0].reshape(ranks, -1)
    table, counts = parted(n, slots, ranks)
    as_it_is, as_many = published(n, slots, ranks)
    assert np.array_equal(as_it_is, theirs)
    assert np.array_equal(np.bincount(theirs.ravel(), minlength=len(n)), as_many)
    assert np.array_equal(np.bincount(table.ravel(), minlength=len(n)), counts)
    assert counts.min() >= 1
    if all(len(set(row)) == len(row) for row in theirs.tolist()):
        assert np.array_equal(table, theirs)
    elif slots <= len(n) * ranks and counts.max() <= ranks:
        # Parted as far as single swaps can: no more second slots than EPLB leaves.
        twice = (holdings(table, len(n))[:, : len(n)] > 1).sum()
        assert twice < sum(len(row) - len(set(row)) for row in theirs.tolist())


def test_more_slots_than_ranks_for_one_expert_are_given_to_others():
    table, counts = parted(np.array([1000.0, 1, 1, 1]), 8, 2)
    assert counts.tolist() == [2, 2, 2, 2]
    assert holdings(table, 4)[:, :4].max() == 1


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 17, 250, 10**6]), min_size=2, max_size=16),
    st.integers(1, 6),
    st.integers(0, 3),
    st.integers(0, 2**32 - 1),
)
def test_merged_slots_load_every_rank_as_eplb_does_on_any_load(load, ranks, more, seed):
    n = np.array(load, dtype=float)
    places = -(-len(n) // ranks) + more
    theirs, counts = published(n, places * ranks, ranks)
    table, slots, shares = merge(theirs, n)
    assert table.shape == shares.shape == theirs.shape
    assert np.array_equal(np.bincount(table.ravel(), minlength=len(n)), slots)
    assert shares.min() >= 0
    assert np.bincount(table.ravel(), weights=shares.ravel(), minlength=len(n)) == pytest.approx(np.ones(len(n)))
    # Nothing twice on a rank while that rank lacks an expert; and nothing moved but copies.
    for ours, before in zip(table.tolist(), theirs.tolist(), strict=True):
        assert len(set(ours)) == min(places, len(n))
        assert set(ours) >= set(before)
    other = np.random.default_rng(seed).integers(0, 1000, len(n))
    for tokens in (n, other):
        assert (tokens[table] * shares).sum(1) == pytest.approx((tokens / counts)[theirs].sum(1))


def test_a_slot_stands_by_for_the_busiest_expert_that_the_rank_lacks():
    # EPLB gives expert 0 four slots on three ranks; what stands by is the most loaded expert that the rank lacks.
    load = np.array([40.0, 9, 8, 7, 6])
    theirs, counts = published(load, 9, 3)
    assert counts.tolist() == [5, 1, 1, 1, 1]
    table, slots, shares = merge(theirs, load)
    for g in range(3):
        standing = table[g][shares[g] == 0].tolist()
        copies = (theirs[g] == 0).sum()
        assert len(standing) == copies - 1
        lacking = sorted(set(range(5)) - set(theirs[g].tolist()), key=lambda e: -load[e])
        assert set(standing) <= set(lacking)
        assert shares[g][table[g] == 0] == pytest.approx(copies / 5)
    assert slots.sum() == 9


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(8, 40), (4, 36), (16, 48)]), st.floats(0.1, 3))
def test_a_plan_that_keeps_eplb_has_its_rank_loads_and_no_expert_twice(seed, shape, spread):
    ranks, slots = shape
    rng = np.random.default_rng(seed)
    head = profile_of((rng.lognormal(0, spread, (2, 32)) * 1000).astype(int) + 1)
    kept = plan(head, ranks=ranks, slots=slots, guard=float("inf"))
    assert plan(head, ranks=ranks, slots=slots).layers == kept.layers  # one window: nothing to be convinced by
    theirs = theirs_in_python.rebalance(head.counts, slots, 1, 1, ranks)[0].reshape(2, ranks, -1)
    later = rng.integers(0, 1000, (5, 2, 32)).astype(float)
    for i, layer in enumerate(kept.layers):
        for tokens in (head.counts[i].astype(float), *later[:, i]):
            each = tokens / np.bincount(theirs[i].ravel(), minlength=32)
            found = rank_load(slot_load(tokens, layer), layer, ranks)
            assert np.sort(found) == pytest.approx(np.sort(each[theirs[i]].sum(1)))
        places = [(s.rank, s.expert) for s in layer.slots]
        assert len(set(places)) == len(places) == slots
        shares = np.bincount([s.expert for s in layer.slots], weights=[s.share for s in layer.slots])
        assert shares == pytest.approx(np.ones(32))
    even = plan(head, ranks=ranks, slots=slots, shares="even")
    assert all(layer == layer.evenly() for layer in even.layers)
    assert "rank_imbalance_even" not in even.predicted
    if any(layer != layer.evenly() for layer in kept.layers):
        assert kept.predicted["rank_imbalance_even"] >= 1


def test_low_precision_goes_where_an_expert_takes_least_and_an_unchanged_load_moves_nothing():
    load = np.array([[4000, 90, 80, 70, 60, 50, 40, 30], [4000, 10, 10, 10, 10, 10, 10, 900]])
    head = profile_of(load)
    made = plan(head, ranks=4, slots=16)
    uneven = 0
    for layer in made.layers:
        for e in range(8):
            mine = [s for s in layer.slots if s.expert == e]
            low = [s.share for s in mine if s.precision != "original"]
            high = [s.share for s in mine if s.precision == "original"]
            uneven += len({s.share for s in mine}) > 1
            assert not low or not high or max(low) <= min(high)
    assert uneven > 0
    again = plan(head, ranks=4, slots=16, previous=made)
    assert again.predicted["moved_bytes"] == 0
    assert again.layers == made.layers


def test_slots_that_do_not_divide_by_the_ranks_have_no_eplb_plan_to_keep():
    assert layers_won(np.ones((1, 2, 5)), np.array([7, 6]), 3, 3.0).tolist() == [True, False]
    head = profile_of([[60, 20, 10, 10]])
    plans = [plan(head, replicas=1, ranks=2, guard=guard).layers for guard in (0, 2.5, float("inf"))]
    assert plans[0] == plans[1] == plans[2]


def test_an_infinite_guard_gives_eplb_and_none_gives_the_plan_from_windows():
    head, _ = alternating(0)
    theirs = theirs_in_python.rebalance(head.counts, 40, 1, 1, 8)[0].reshape(len(head.counts), 8, -1)
    kept = plan(head, ranks=8, slots=40, guard=float("inf"), shares="even")
    legal = 0
    for layer, table in zip(kept.layers, theirs.tolist(), strict=True):
        if all(len(set(row)) == len(row) for row in table):
            legal += 1
            assert table_of(layer, 8) == [sorted(row) for row in table]
    assert legal > 0
    free = plan(head, ranks=8, slots=40, guard=0, shares="even")
    assert [table_of(a, 8) for a in free.layers] != [table_of(a, 8) for a in kept.layers]


def test_a_gain_that_repeats_is_taken_and_holds():
    head, tail = alternating(1)
    guarded, free = plan(head, ranks=8, slots=40), plan(head, ranks=8, slots=40, guard=0)
    assert guarded.layers == free.layers
    kept = plan(head, ranks=8, slots=40, guard=float("inf"))
    assert score(guarded, tail).means()["rank_imbalance"] < 0.98 * score(kept, tail).means()["rank_imbalance"]


def test_windows_that_differ_by_chance_alone_do_not_convince():
    rng = np.random.default_rng(2)
    truth = rng.dirichlet(np.ones(32), 6)
    series = np.array([[rng.multinomial(300, p) for p in truth] for _ in range(8)])
    head = profile_of(series.sum(0), series=series)
    kept = plan(head, ranks=8, slots=40, guard=float("inf"))
    assert plan(head, ranks=8, slots=40).layers == kept.layers


def test_too_little_to_judge_by_keeps_eplb():
    rng = np.random.default_rng(3)
    one = rng.integers(0, 500, (1, 3, 16)).astype(float)
    assert [gain.shape for gain in left_out(one, np.full(3, 16), 4)] == [(0, 3)] * 2
    small = np.zeros((4, 3, 16))
    small[:, :, 0] = 16 * LEAST / 4
    assert [gain.shape for gain in left_out(small, np.full(3, 16), 4)] == [(0, 3)] * 2
    assert [gain.shape for gain in left_out(2 * small, np.full(3, 16), 4)] == [(2, 3)] * 2
    assert not layers_won(one, np.full(3, 16), 4, 3.0).any()
    # One layer cannot say how layers differ.
    assert not convinced(np.full((4, 1), -0.5), 3.0).any()


def test_blocks_and_layers_without_load_count_for_neither():
    windows = np.random.default_rng(4).integers(1, 100, (4, 2, 8)).astype(float)
    windows[:, 1] = 0
    windows[2] = 0
    for gain in left_out(windows, np.full(2, 8), 2):
        assert (gain[:, 1] == 0).all()
        assert (gain[2] == 0).all()
        assert np.isfinite(gain).all()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(2, 5).flatmap(
        lambda layers: st.lists(
            st.lists(st.floats(-0.3, 0.3), min_size=layers, max_size=layers), min_size=2, max_size=4
        )
    ),
    st.floats(0, 5),
    st.floats(0, 5),
)
def test_more_guard_never_lets_more_layers_through(rows, a, b):
    gain = np.array(rows)
    low, high = convinced(gain, min(a, b)), convinced(gain, max(a, b))
    assert not (high & ~low).any()
    assert convinced(gain, 0).all()
    assert not convinced(gain, float("inf")).any()
    assert not convinced(np.abs(gain), 1.0).any()


def test_noise_in_one_layer_is_told_from_a_gain_of_all():
    # The same mean of layer 0; in one case all layers agree with it, in the other it stands alone amid noise.
    agree = np.tile([-0.05, -0.06, -0.05, -0.04], (4, 1)) + np.array([[0.01], [-0.01], [0.0], [0.0]])
    assert convinced(agree, 3.0).all()
    alone = np.array([[-0.3, 0.2, 0.1, 0.0], [0.2, -0.2, 0.0, 0.1], [-0.2, 0.1, -0.1, 0.1], [0.1, 0.0, 0.1, -0.1]])
    assert not convinced(alone, 3.0).any()


@pytest.mark.parametrize("guard", [-1.0, float("nan")])
def test_a_guard_that_is_no_number_of_errors_is_refused(guard):
    with pytest.raises(InputError, match="guard is a number of standard errors"):
        plan(profile_of([[1, 2]]), guard=guard)
