import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.planning.replicas import replica_counts
from equipoise.streaming.moves import migrate, moved_slots, transfers

SHAPES = st.tuples(st.integers(1, 3), st.integers(2, 7), st.integers(0, 6), st.integers(0, 10_000))


def case(shape):
    layers, experts, spare, seed = shape
    rng = np.random.default_rng(seed)
    load = rng.gamma(0.5, 10.0, (layers, experts)) * rng.integers(0, 2, (layers, experts))
    return load, replica_counts(rng.gamma(0.5, 10.0, (layers, experts)), spare), spare


@settings(max_examples=200, deadline=None)
@given(SHAPES)
def test_free_moves_end_at_the_water_filled_level(shape):
    load, slots, spare = case(shape)
    after = migrate(load, slots)
    best = replica_counts(load, spare)
    assert (load / after).max(1) == pytest.approx((load / best).max(1))
    assert (after.sum(1) == slots.sum(1)).all()
    assert after.min() >= 1


@settings(max_examples=200, deadline=None)
@given(SHAPES, st.floats(0, 2), st.integers(0, 6))
def test_price_and_budget_hold_and_nothing_gets_worse(shape, price, budget):
    load, slots, _ = case(shape)
    after = migrate(load, slots, price, budget)
    assert moved_slots(slots, after).sum() <= budget
    assert ((load / after).max(1) <= (load / slots).max(1) + 1e-12).all()
    free = migrate(load, slots)
    assert moved_slots(slots, migrate(load, slots, price)).sum() <= moved_slots(slots, free).sum()


@settings(max_examples=100, deadline=None)
@given(SHAPES)
def test_a_path_only_goes_down(shape):
    load, slots, _ = case(shape)
    for row, now in zip(load, slots, strict=True):
        level, moves = transfers(row, now)
        assert len(level) == len(moves) + 1
        assert (np.diff(level) <= 1e-12).all()


def test_the_best_placement_is_left_alone_and_the_moves_are_the_fewest():
    load = np.array([[9.0, 1.0, 1.0, 1.0]])
    best = replica_counts(load, 3)
    assert (migrate(load, best) == best).all()
    # From a replica each for 1, 2 and 3, expert 0 needs all three: three moves, no more.
    after = migrate(load, np.array([[1, 2, 2, 2]]))
    assert (after == best).all()
    assert moved_slots(np.array([[1, 2, 2, 2]]), after).sum() == 3


def test_a_dear_move_is_not_made_and_the_budget_goes_to_the_layer_that_gains_most():
    load = np.array([[10.0, 9.0, 1.0, 1.0], [40.0, 1.0, 1.0, 1.0]])
    slots = np.array([[1, 1, 2, 1], [1, 1, 2, 1]])
    assert (migrate(load, slots, price=100.0) == slots).all()
    after = migrate(load, slots, budget=1)
    assert (after[0] == slots[0]).all()
    assert (after[1] == [2, 1, 1, 1]).all()
