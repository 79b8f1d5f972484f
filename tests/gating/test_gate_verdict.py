"""Verdicts: which end counts, what is said, and how many items would resolve a wide interval."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.evaluation.paired import Measure, compare, documents_needed, least_documents
from equipoise.gating.verdict import judge


def _share(values: np.ndarray) -> Measure:
    return Measure("share", np.asarray(values, dtype=float), np.ones(len(values)))


def _answers(same: int, gained: int, lost: int) -> tuple[Measure, Measure]:
    before = np.array([1.0] * same + [0.0] * gained + [1.0] * lost)
    after = np.array([1.0] * same + [1.0] * gained + [0.0] * lost)
    return _share(before), _share(after)


def _text(before: np.ndarray, change: np.ndarray) -> tuple[Measure, Measure]:
    tokens = np.full(len(before), 255.0)
    return Measure("perplexity", before, tokens, False), Measure("perplexity", before + change, tokens, False)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 60), st.integers(0, 15), st.integers(0, 15), st.floats(0.01, 40))
def test_accuracy_is_inside_only_if_the_worse_end_is(same: int, gained: int, lost: int, bound: float):
    if same + gained + lost == 0:
        same = 1
    before, after = _answers(same, gained, lost)
    verdict, difference = judge("accuracy", before, after, bound), compare(before, after)
    assert verdict.loss == pytest.approx(-difference.value)
    assert verdict.ci95 == pytest.approx((-difference.high, -difference.low))
    assert verdict.inside == (-difference.low <= bound)
    if verdict.inside:
        assert verdict.needed is None
        assert "inside" in verdict.reason
    elif verdict.needed is None:
        assert verdict.loss >= bound
        assert "beyond" in verdict.reason
    else:
        assert verdict.needed > verdict.n
        assert f"{verdict.needed:,} documents" in verdict.reason


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.integers(0, 3), st.integers(0, 3), st.floats(0.2, 30))
def test_the_documents_needed_do_resolve_it(same: int, gained: int, lost: int, bound: float):
    """Right-or-wrong answers: as many more of the same, and the worse end is inside; it was not before."""
    before, after = _answers(same, gained, lost)
    verdict = judge("accuracy", before, after, bound)
    if verdict.needed is None or verdict.needed > 50_000:
        return
    times = -(-verdict.needed // verdict.n)
    assert judge("accuracy", *_answers(times * same, times * gained, times * lost), bound).inside
    fewer = (verdict.needed - 1) // verdict.n
    if fewer:
        assert not judge("accuracy", *_answers(fewer * same, fewer * gained, fewer * lost), bound).inside


@pytest.mark.parametrize(("rise", "sd", "bound"), [(0.0004, 0.004, 0.1), (0.0, 0.01, 0.2), (-0.001, 0.02, 0.05)])
def test_windows_needed_do_resolve_it(rise: float, sd: float, bound: float):
    rng = np.random.default_rng(0)
    change = rng.normal(0, sd, 40)
    change += rise - change.mean()
    before, after = _text(rng.uniform(2, 4, 40), change)
    verdict = judge("perplexity", before, after, bound)
    assert not verdict.inside
    assert verdict.needed is not None
    # the same spread and mean over as many windows
    for count, wanted in ((verdict.needed, True), (verdict.needed - 2, False)):
        many = rng.normal(0, 1, count)
        many = rise + (many - many.mean()) / many.std(ddof=1) * change.std(ddof=1)
        assert judge("perplexity", *_text(rng.uniform(2, 4, count), many), bound).inside is wanted
    assert "windows instead of 40" in verdict.reason


def test_a_loss_beyond_the_bound_says_so_and_asks_for_nothing():
    before, after = _answers(80, 0, 20)
    verdict = judge("accuracy", before, after, 1.0)
    assert verdict.needed is None
    assert "with all of its interval" in verdict.reason
    before, after = _answers(80, 4, 6)
    assert "in the estimate itself" in judge("accuracy", before, after, 1.0).reason
    rng = np.random.default_rng(0)
    worse = judge("perplexity", *_text(rng.uniform(2, 4, 50), rng.normal(0.01, 0.001, 50)), 0.1)
    assert worse.needed is None
    assert worse.loss == pytest.approx(1.0, abs=0.1)


def test_nothing_changed():
    same = np.array([2.0, 3.0, 4.0])
    verdict = judge("perplexity", *_text(same, np.zeros(3)), 1e-6)
    assert (verdict.loss, verdict.ci95, verdict.inside) == (0.0, (0.0, 0.0), True)
    before, after = _answers(200, 0, 0)
    verdict = judge("accuracy", before, after, 1.0)
    assert verdict.loss == 0
    assert not verdict.inside  # 200 equal answers do not exclude a drop of 1 point
    assert verdict.needed == least_documents(1.0) == documents_needed(before, after, 1.0)


@pytest.mark.parametrize("bound", [0.1, 0.5, 1.0, 5.0])
def test_least_documents_is_the_least(bound: float):
    least = least_documents(bound)
    assert judge("accuracy", *_answers(least, 0, 0), bound).inside
    assert not judge("accuracy", *_answers(least - 1, 0, 0), bound).inside
