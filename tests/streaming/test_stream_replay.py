import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming_cases import regimes

from equipoise.errors import InputError
from equipoise.metrics import slot_lis
from equipoise.planning.replicas import replica_counts
from equipoise.streaming import POLICIES, Adaptive, AdaptiveOptions, Replay, make_policy, replay


def result(parts, spare=3, **arguments):
    out = Replay(POLICIES)
    out.steps.extend(replay(parts, spare, **arguments))
    return out


def by_hand(parts, spare, loads):
    """Mean LIS and moves when step t is placed by loads(t), counted slot by slot."""
    windows = parts.sum(1)
    scores, moves, before = [], 0, None
    for t in range(1, len(windows)):
        slots = replica_counts(loads(windows, t), spare)
        layers = []
        for l in range(windows.shape[1]):  # noqa: E741
            load = np.concatenate([np.full(r, n / r) for n, r in zip(windows[t, l], slots[l], strict=True)])
            layers.append(slot_lis(load, windows.shape[2]))
        scores.append(np.mean(layers))
        moves += 0 if before is None else int(np.maximum(slots - before, 0).sum())
        before = slots
    return float(np.mean(scores)), moves


def test_the_policies_of_the_paper_are_what_the_paper_says():
    parts = regimes([0, 1, 2], windows=4)
    found = result(parts)
    for name, loads in (
        ("short", lambda w, t: w[t - 1]),
        ("long", lambda w, t: w[:t].sum(0)),
        ("static", lambda w, t: w[0]),
    ):
        lis, moves = by_hand(parts, 3, loads)
        assert found.lis()[name] == pytest.approx(lis)
        assert found.moves()[name] == moves
    assert found.lis()["oracle"] == pytest.approx(by_hand(parts, 3, lambda w, t: w[t])[0])
    raw = parts.sum(1)[1:]
    assert found.lis()["raw"] == pytest.approx((raw.shape[2] * raw.max(2) / raw.sum(2)).mean())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 7), st.sampled_from([1, 3]))
def test_no_policy_sees_the_window_it_decides_for(seed, cut, parts):
    rng = np.random.default_rng(seed)
    stream = rng.integers(0, 30, (8, parts, 2, 5)).astype(float)
    other = stream.copy()
    other[cut:] = rng.integers(0, 30, other[cut:].shape)
    for name in POLICIES:
        if name == "oracle":
            continue
        one, two = make_policy(name, 2), make_policy(name, 2)
        for t in range(cut):
            one.observe(stream[t])
            two.observe(other[t])
            assert np.array_equal(one.decide(), two.decide())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 5))
def test_oracle_bounds_every_policy_and_adaptive_moves_at_most_half_of_short(seed, spare):
    rng = np.random.default_rng(seed)
    stream = rng.gamma(0.3, 50.0, (12, 2, 2, 6)).round()
    found = result(stream, spare)
    for step in found.steps:
        for name in POLICIES:
            assert step.lis["oracle"] <= step.lis[name] + 1e-9
    assert found.moves()["adaptive"] <= 0.5 * found.moves()["short"]


def test_bytes_are_those_of_the_expert_that_moves_in():
    parts = regimes([0, 1], windows=3)
    size = np.arange(1, 17).reshape(2, 8)
    found = result(parts, slot_bytes=size)
    wanted = 0
    before = None
    for t in range(1, len(parts)):
        slots = replica_counts(parts[t - 1].sum(0), 3)
        wanted += 0 if before is None else int((np.maximum(slots - before, 0) * size).sum())
        before = slots
    assert found.moved_bytes()["short"] == wanted > 0


def test_a_budget_in_bytes_bounds_every_step():
    parts = regimes([0, 1, 2, 3], windows=3)
    size = np.full((2, 8), 100)
    free = result(parts, slot_bytes=size, options=AdaptiveOptions(move_price=0.0))
    tight = result(parts, slot_bytes=size, options=AdaptiveOptions(move_price=0.0, move_bytes=250))
    assert max(step.moved_bytes["adaptive"] for step in free.steps) > 250
    assert 0 < max(step.moved_bytes["adaptive"] for step in tight.steps) <= 250
    with pytest.raises(InputError, match="slot_bytes"):
        Adaptive(2, AdaptiveOptions(move_bytes=5))


def test_silent_windows_and_layers_are_balanced_and_break_nothing():
    parts = regimes([0], windows=6)
    parts[2] = 0
    parts[:, :, 1] = 0
    found = result(parts)
    assert found.steps[1].lis["adaptive"] == 1.0
    assert all(np.isfinite(v) for v in found.lis().values())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda p: p[:1], "at least 2 windows"),
        (lambda p: p[:, 0], "shape"),
        (lambda p: p - 1e9, "from 0"),
        (lambda p: p * np.nan, "NaN"),
    ],
)
def test_streams_that_are_none_are_refused(change, word):
    with pytest.raises(InputError, match=word):
        result(change(regimes([0])))


def test_a_policy_that_is_none_is_refused_with_the_choices():
    with pytest.raises(InputError, match="raw, static, long, short, adaptive, oracle"):
        result(regimes([0]), policies=("best",))
