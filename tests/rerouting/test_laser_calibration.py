"""Parts of the calibration: which rule each layer gets, against brute force; sensitivities, measured and shrunk."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core_models import batch
from equipoise.evaluation.perplexity import TextResult
from equipoise.rerouting import Rule
from equipoise.rerouting.allotment import BINS, allot
from equipoise.rerouting.calibration import loss_increase
from equipoise.rerouting.sensitivity import LEAST, part_of, sensitivities, shrink
from tiny import FAMILIES


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 6), st.floats(0.01, 3))
@settings(max_examples=80, deadline=None)
def test_allotment_is_the_optimum_up_to_rounding(seed: int, layers: int, rules: int, allowed: float):
    draw = np.random.default_rng(seed)
    lis = [draw.uniform(1, 3, rules) for _ in range(layers)]
    cost = [np.concatenate([[0.0], draw.uniform(0, 1, rules - 1)]) for _ in range(layers)]

    def least(limit: float) -> float:
        every = itertools.product(range(rules), repeat=layers)
        fits = (p for p in every if sum(c[i] for c, i in zip(cost, p, strict=True)) <= limit)
        return min(sum(v[i] for v, i in zip(lis, p, strict=True)) for p in fits)

    picks = allot(lis, cost, allowed)
    assert sum(c[i] for c, i in zip(cost, picks, strict=True)) <= allowed * (1 + 1e-9)
    value = sum(v[i] for v, i in zip(lis, picks, strict=True))
    assert least(allowed) - 1e-9 <= value <= least(allowed * (1 - layers / BINS)) + 1e-9


def test_allotment_at_the_ends():
    lis = [np.array([3.0, 2.0, 2.0]), np.array([2.0, 2.5, 1.0])]
    cost = [np.array([0.0, 2.0, 1.0]), np.array([0.0, 0.0, 9.0])]
    assert allot(lis, cost, 0.0).tolist() == [0, 0]
    assert allot(lis, cost, np.inf).tolist() == [2, 2]  # of equal LIS what costs least
    assert allot(lis, cost, 1.0).tolist() == [2, 0]
    assert allot(lis, cost, 9.5).tolist() == [0, 2] or allot(lis, cost, 9.5).tolist() == [2, 0]
    assert allot(lis, cost, 10.01).tolist() == [2, 2]


def test_shrinking():
    sure = np.full(3, 1e-6)
    assert shrink(np.array([1.0, 2.0, 3.0]), sure) == pytest.approx([1, 2, 3], rel=1e-3)
    # Values that differ less than their errors say nothing but their mean.
    assert shrink(np.array([1.0, 1.1, 0.9]), np.full(3, 1.0)) == pytest.approx([1, 1, 1])
    # What was not measured is the mean; nothing is free.
    out = shrink(np.array([1.0, 3.0, 0.0, -2.0]), np.array([0.1, 0.1, np.inf, 0.1]))
    mean = 2 / 3
    assert out[2] == pytest.approx(mean)
    assert out[3] == pytest.approx(LEAST * mean)
    assert shrink(np.array([-1.0, 0.0]), np.array([0.1, 0.1])).tolist() == [1, 1]
    assert shrink(np.zeros(2), np.full(2, np.inf)).tolist() == [1, 1]


def test_sensitivities_find_the_layer_that_does_nothing():
    model = FAMILIES["mixtral"]()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(0.01)
    texts = [batch(4, 24, seed=i) for i in range(3)]
    out = sensitivities(model, texts, Rule(gap=1, extra=6), 64)
    assert len(out) == 3
    assert out[1] == out.min()
    assert out[1] < 0.2 * out.max()
    # A rule that moves nothing measures nothing.
    assert sensitivities(model, texts, Rule(), 64).tolist() == [1, 1, 1]


def test_the_error_of_an_increase():
    draw = np.random.default_rng(0)
    domains = ("a",) * 40 + ("b",) * 40
    before = TextResult(draw.uniform(2, 3, 80), np.full(80, 100), domains)
    change = np.where(np.array(domains) == "a", 0.0, 0.02)  # as a share: all of it between the domains
    after = TextResult(before.nll * (1 + change), before.tokens, domains)
    increase, error = loss_increase(before, after)
    assert increase == pytest.approx(float(after.nll.sum() / before.nll.sum()) - 1)
    one = TextResult(after.nll, after.tokens, ("a",) * 80)
    assert error < 0.3 * loss_increase(TextResult(before.nll, before.tokens, ("a",) * 80), one)[1]
    # Against the scatter of the estimate over samples of a known population.
    found = []
    for _ in range(400):
        noise = draw.normal(0.005, 0.02, 80)
        found.append(loss_increase(before, TextResult(before.nll * (1 + noise), before.tokens, domains)))
    assert np.mean([e for _, e in found]) == pytest.approx(np.std([i for i, _ in found]), rel=0.15)
    alone = TextResult(before.nll[:1], before.tokens[:1], ("a",))
    assert loss_increase(alone, alone) == (0.0, float("inf"))


def test_a_part_of_the_text():
    texts = [batch(8, 24, seed=i) for i in range(20)]
    part = part_of(texts, 400)
    assert len(part) == 8
    assert sum(b["input_ids"].numel() for b in part) == pytest.approx(400, abs=100)
    assert [len(b["input_ids"]) for b in part_of(texts[:1], 10)] == [1]
