import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_joint_plan import profile_of

from equipoise.errors import InputError
from equipoise.planning import plan
from equipoise.planning.robust import effective_load, lis_curve, shrink, windows_of
from equipoise.scoring import score
from equipoise.types import Profile


def test_windows_that_differ_by_chance_are_drawn_to_the_total():
    rng = np.random.default_rng(0)
    truth = rng.dirichlet(np.ones(16))
    windows = np.array([rng.multinomial(200, truth) for _ in range(8)], dtype=float)
    pooled = windows.sum(0) / windows.sum()
    before = np.abs(windows / 200 - pooled).sum()
    assert np.abs(shrink(windows) - pooled).sum() < 0.35 * before


def test_windows_that_differ_in_truth_are_kept():
    windows = np.array([[9000, 1000], [1000, 9000]], dtype=float)
    assert shrink(windows) == pytest.approx(windows / 10000, abs=1e-3)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0, 1, 50, 10**12]), min_size=4, max_size=4), min_size=1, max_size=5),
    st.lists(st.integers(0, 3), max_size=6),
)
def test_fractions_sum_to_one_and_the_curve_is_the_mean_lis(rows, order):
    fractions = shrink(np.array(rows, dtype=float))
    assert fractions.sum(1) == pytest.approx(np.ones(len(fractions)))
    curve = lis_curve(np.array(order, dtype=np.int64), fractions)
    for given_ in range(len(order) + 1):
        slots = 1 + np.bincount(order[:given_], minlength=4)
        assert curve[given_] == pytest.approx((fractions / slots).max(1).mean() * 4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=6))
def test_effective_load_lies_between_mean_and_largest(rows):
    f = np.array(rows)
    got = effective_load(f)
    assert (got <= f.max(0) + 1e-12).all()
    assert (got >= f.mean(0) - 1e-9).all()


def test_windows_come_from_series_from_ids_or_from_the_total():
    counts = np.arange(40).reshape(5, 2, 4)
    profile = profile_of(counts.sum(0), series=counts)
    assert windows_of(profile, 16).shape == (5, 2, 4)
    assert windows_of(profile, 2).sum(0).tolist() == counts.sum(0).tolist()
    assert windows_of(profile, 2).shape == (2, 2, 4)
    assert windows_of(profile, 1).shape == (1, 2, 4)
    ids = np.random.default_rng(0).integers(0, 4, (100, 2, 2))
    total = np.stack([np.bincount(ids[:, i].ravel(), minlength=4) for i in range(2)])
    trace = Profile(counts=total, layer_ids=np.arange(2), meta={}, topk_ids=ids)
    assert windows_of(trace, 16).shape == (3, 2, 4)


def test_robust_plans_hold_out_better_when_the_stream_alternates():
    # Each expert is busy in one kind of step; the first half shows both kinds, unequally often.
    rng = np.random.default_rng(0)
    kinds = rng.dirichlet(np.full(32, 0.2), 2)
    mix = [0, 0, 0, 0, 0, 1, 0, 1, 1, 1, 0, 1]
    series = np.array([[rng.multinomial(4000, kinds[k])] for k in mix])
    head = profile_of(series[:6].sum(0), series=series[:6])
    tail = profile_of(series[6:].sum(0), series=series[6:])
    robust = score(plan(head, replicas=8, budget=1.0), tail).means()["lis"]
    total = score(plan(head, replicas=8, budget=1.0, robust_windows=1), tail).means()["lis"]
    assert robust < 0.9 * total


def test_number_of_windows_must_be_positive():
    with pytest.raises(InputError, match="robust-windows"):
        plan(profile_of([[1, 2]]), robust_windows=0)
