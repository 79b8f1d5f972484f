import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import InputError
from equipoise.planning.across import spread_replicas
from equipoise.planning.replicas import replica_counts, water_fill

loads = st.lists(st.integers(0, 60), min_size=1, max_size=5)


def splits(slots, experts):
    """Every way to give `slots` slots to experts, at least one each."""
    for cut in itertools.combinations(range(1, slots), experts - 1):
        yield np.diff([0, *cut, slots])


@settings(max_examples=150, deadline=None)
@given(loads, st.integers(0, 5))
def test_water_filling_is_optimal_for_every_number_of_replicas(load, spare):
    n = np.array(load, dtype=float)
    _, level = water_fill(n, spare)
    for r in range(spare + 1):
        assert level[r] == pytest.approx(min((n / s).max() for s in splits(len(n) + r, len(n))))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 7.0, 1e12, 3e11]), min_size=1, max_size=40), st.integers(0, 100))
def test_counts_add_up_and_the_curve_is_what_they_give(load, spare):
    n = np.array(load)
    counts = replica_counts(n, spare)
    order, level = water_fill(n, spare)
    assert counts.sum() == len(n) + spare
    assert counts.min() >= 1
    assert (np.diff(level) <= 0).all()
    assert level[-1] == pytest.approx((n / counts).max())
    assert np.array_equal(np.bincount(order, minlength=len(n)) + 1, counts)


def test_a_layer_without_load_is_filled_evenly_not_all_on_expert_0():
    assert replica_counts(np.zeros(4), 6).tolist() == [3, 3, 2, 2]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=8), st.integers(0, 30), st.integers(1, 4))
def test_no_expert_gets_more_slots_than_allowed(load, spare, most):
    counts = replica_counts(np.array(load, dtype=float), spare, most)
    assert counts.max() <= most
    assert counts.sum() == min(len(load) + spare, len(load) * most)


def brute(load, sizes, limit, objective):
    """The best sum or max of LIS over all replica counts of all layers."""
    experts = load.shape[1]
    curves = []
    for n, size in zip(load, sizes, strict=True):
        room = (limit - experts * sum(sizes)) // size
        best = [min((n / s).max() for s in splits(experts + r, experts)) for r in range(room + 1)]
        curves.append([(r * size, experts * b / n.sum() if n.any() else 1.0) for r, b in enumerate(best)])
    room = limit - experts * sum(sizes)
    merge = sum if objective == "sum" else max
    return min(merge(v for _, v in pick) for pick in itertools.product(*curves) if sum(b for b, _ in pick) <= room)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=3),
    st.lists(st.integers(2, 5), min_size=3, max_size=3),
    st.integers(0, 14),
    st.sampled_from(["sum", "max"]),
)
def test_spread_over_layers_is_the_optimum(load, sizes, room, objective):
    n = np.array(load, dtype=float)
    size = np.array(sizes[: len(n)])
    limit = 3 * int(size.sum()) + room
    found = spread_replicas(n, size, limit, objective)
    assert (found.replicas * size[:, None]).sum() <= limit
    assert found.value == pytest.approx(brute(n, size.tolist(), limit, objective))
    assert found.bound == pytest.approx(found.value)


def test_a_limit_below_the_model_is_refused():
    with pytest.raises(InputError, match="cannot hold one slot"):
        spread_replicas(np.ones((2, 3)), np.array([10, 10]), 59)
