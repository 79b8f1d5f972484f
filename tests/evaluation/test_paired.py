"""Measures against the harness's aggregations, and intervals against simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import InputError
from equipoise.evaluation.paired import Measure, compare, pool


def _share(values):
    return Measure("share", np.asarray(values, dtype=float), np.ones(len(values)))


def test_measures_are_the_aggregations_of_the_harness():
    metrics = pytest.importorskip("lm_eval.api.metrics", reason="the extra [eval] is not installed")
    rng = np.random.default_rng(0)
    likelihood, size = -rng.uniform(10, 90, 20), rng.integers(5, 50, 20).astype(float)
    pairs = list(zip(likelihood, size, strict=True))
    right = rng.integers(0, 2, 20).astype(float)
    assert _share(right).value == pytest.approx(metrics.mean(right.tolist()))
    assert _share(right).stderr == pytest.approx(metrics.mean_stderr(right.tolist()))
    perplexity = Measure("perplexity", -likelihood / size, size, False)
    assert perplexity.value == pytest.approx(metrics.weighted_perplexity(pairs))
    bits = Measure("mean", -likelihood / size / math.log(2), size, False)
    assert bits.value == pytest.approx(metrics.bits_per_byte(pairs))
    ones = Measure("perplexity", -likelihood / 20, np.ones(20), False)
    assert ones.value == pytest.approx(metrics.perplexity((likelihood / 20).tolist()))
    # the slope formula is what a bootstrap of the documents gives
    draws = rng.integers(0, 20, (4000, 20))
    values = np.exp((-likelihood)[draws].sum(1) / size[draws].sum(1))
    assert perplexity.stderr == pytest.approx(values.std(), rel=0.25)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_right_and_wrong_answers(pairs):
    before, after = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    out = compare(_share(before), _share(after))
    assert out.value == pytest.approx(100 * (after.mean() - before.mean()))
    assert -100 <= out.low <= out.high <= 100
    assert out.low <= out.value <= out.high
    back = compare(_share(after), _share(before))
    np.testing.assert_allclose([back.value, back.low, back.high], [-out.value, -out.high, -out.low], atol=1e-9)
    assert out.high > out.low  # agreement on few documents is no proof of agreement


@pytest.mark.parametrize(
    ("n", "gain", "loss"), [(30, 0.05, 0.02), (100, 0.1, 0.1), (100, 0.01, 0.01), (500, 0.03, 0.01)]
)
def test_coverage_of_paired_proportions(n, gain, loss):
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(2000):
        u = rng.random(n)
        change = (u < gain).astype(float) - (u > 1 - loss)
        before = np.where(change > 0, 0.0, np.where(change < 0, 1.0, rng.integers(0, 2, n)))
        out = compare(_share(before), _share(before + change))
        held += out.low <= 100 * (gain - loss) <= out.high
    assert held >= 0.935 * 2000


def test_shares_that_are_no_right_or_wrong_take_the_t_interval():
    before, after = np.array([0.2, 0.4, 0.6]), np.array([0.3, 0.4, 0.8])
    out = compare(_share(before), _share(after))
    assert out.value == pytest.approx(10)
    half = 4.302653 * np.std(after - before, ddof=1) / 3**0.5 * 100
    assert (out.low, out.high) == pytest.approx((10 - half, 10 + half), rel=1e-5)
    assert out.unit == "points"


def test_perplexities_in_percent_and_nothing_changed():
    measure = Measure("perplexity", np.array([2.0, 3.0]), np.array([10.0, 30.0]), False)
    other = Measure("perplexity", np.array([2.1, 3.1]), np.array([10.0, 30.0]), False)
    out = compare(measure, other)
    assert (out.value, out.unit, out.n) == (pytest.approx(100 * math.expm1(0.1)), "%", 2)
    same = compare(measure, measure)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_pooling_counts_each_document_once():
    pooled = pool([_share([1, 0]), _share([1, 1, 1, 0])])
    assert (pooled.value, len(pooled.values)) == (pytest.approx(4 / 6), 6)
    with pytest.raises(InputError, match="only shares"):
        pool([Measure("perplexity", np.ones(2), np.ones(2), False)])
    with pytest.raises(InputError, match="only shares"):
        pool([])


def test_other_documents_are_refused():
    with pytest.raises(InputError, match="same documents"):
        compare(_share([1, 0]), _share([1, 0, 1]))
    with pytest.raises(InputError, match="same documents"):
        compare(_share([1, 0]), Measure("share", np.ones(2), np.array([1.0, 2.0])))
