"""The search over a front: properties on any front, and how often noise gets a bad plan through."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from equipoise.gating.search import search, spread

FRONTS = st.lists(st.booleans(), max_size=12)
"""Whether each plan, from the most balanced to the safest, measures inside the bound: in any order."""


def _run(front: list[bool]) -> tuple[int | None, list[int]]:
    asked: list[int] = []

    def inside(plan: int) -> bool:
        asked.append(plan)
        return front[plan]

    return search(len(front), inside), asked


@given(FRONTS)
def test_what_is_accepted_was_measured_inside_and_is_the_most_balanced_of_those(front: list[bool]):
    accepted, asked = _run(front)
    passed = [plan for plan in asked if front[plan]]
    assert accepted == (min(passed) if passed else None)


@given(FRONTS)
def test_the_unchanged_model_when_nothing_passes_and_only_after_asking(front: list[bool]):
    accepted, asked = _run(front)
    if not any(front):
        assert accepted is None
    if accepted is None and front:
        assert 0 in asked
        assert len(front) - 1 in asked


@given(FRONTS)
def test_no_plan_twice_and_never_more_than_there_are(front: list[bool]):
    _, asked = _run(front)
    assert len(set(asked)) == len(asked) <= len(front)
    if front and front[0]:
        assert asked == [0]
    elif not any(front):
        assert len(asked) == min(2, len(front))
    # a refusal is followed by nothing but the one change of ends
    refused = [i for i, plan in enumerate(asked) if not front[plan]]
    assert all(i in (0, len(asked) - 1) for i in refused)


@given(st.integers(0, 12), st.integers(0, 12))
def test_where_loss_falls_along_the_front_it_finds_the_most_balanced_of_all(plans: int, bad: int):
    front = [plan >= bad for plan in range(plans)]
    accepted, _ = _run(front)
    assert accepted == (bad if bad < plans else None)


@given(st.lists(st.integers(), max_size=20), st.integers(1, 25))
def test_plans_are_spread_over_the_front_with_both_ends(items: list[int], most: int):
    chosen = spread(list(enumerate(items)), most)
    places = [place for place, _ in chosen]
    assert len(chosen) == min(most, len(items))
    assert places == sorted(set(places))
    if items:
        assert places[0] == 0
        if most > 1:
            assert places[-1] == len(items) - 1
    if len(places) > 2:
        gaps = np.diff(places)
        assert gaps.max() - gaps.min() <= 1


def test_noise_gets_a_bad_plan_through_in_at_most_one_of_twenty_searches():
    """Every plan truly at the bound, each measured with noise of its own: the worst there is."""
    rng = np.random.default_rng(0)
    plans, runs = 8, 20_000
    lucky = rng.random((runs, plans)) < 0.025  # one end of a 95 % interval
    wrong = sum(_run(row.tolist())[0] is not None for row in lucky)
    assert wrong <= 0.055 * runs
    # what it is for: asking until one passes would let through more than three times as many
    assert lucky.any(1).sum() > 0.15 * runs


def test_fewer_still_where_some_plans_are_good():
    """Good plans at the safe end, bad ones before them and one behind: still one bad in twenty at most."""
    rng = np.random.default_rng(1)
    runs = 20_000
    bad = np.array([True, True, False, True, True, False, False, False])
    inside = np.where(bad, rng.random((runs, 8)) < 0.025, rng.random((runs, 8)) < 0.9)
    accepted = [_run(row.tolist())[0] for row in inside]
    assert sum(plan is not None and bad[plan] for plan in accepted) <= 0.055 * runs
    assert np.mean([plan == 5 for plan in accepted]) > 0.6
