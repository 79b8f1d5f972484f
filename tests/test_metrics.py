"""Measures of balance against their definitions in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from core_cases import layer_slots
from equipoise import metrics
from equipoise.types import LayerPlan, Slot

COUNTS = hnp.arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(1, 8)), elements=st.integers(0, 10**9))


@given(COUNTS)
def test_lis_is_definition_1(counts: np.ndarray):
    """LIS = E * max n / (T * k), and T * k is what the experts got together."""
    for row, got in zip(counts.tolist(), metrics.lis(counts), strict=True):
        assert got == pytest.approx(len(row) * max(row) / sum(row) if sum(row) else 1)
        assert 1 - 1e-12 <= got <= len(row) + 1e-12


def test_lis_of_the_corner_cases():
    assert metrics.lis([5, 5, 5, 5]) == 1
    assert metrics.lis([20, 0, 0, 0]) == 4
    assert metrics.lis([0, 0, 0]) == 1
    assert metrics.lis([[1, 3], [0, 0]]).tolist() == [1.5, 1.0]
    assert metrics.lis(np.array([2**53, 2**53])) == 1


@given(COUNTS, st.data())
def test_slot_load_shares_an_experts_tokens(counts: np.ndarray, data: st.DataObject):
    experts = counts.shape[1]
    layer = LayerPlan(0, "", experts, data.draw(layer_slots(experts)))
    load = metrics.slot_load(counts, layer)
    assert load.shape == (len(counts), len(layer.slots))
    for row, slots in zip(counts, load, strict=True):
        for expert in range(experts):
            mine = sum(x for x, slot in zip(slots, layer.slots, strict=True) if slot.expert == expert)
            assert mine == pytest.approx(row[expert])
        top = experts * max(slots) / sum(row) if sum(row) else 1
        assert metrics.slot_lis(slots, experts) == pytest.approx(top)


@given(COUNTS)
def test_without_replicas_slots_are_experts(counts: np.ndarray):
    layer = LayerPlan(0, "", counts.shape[1], tuple(Slot(e) for e in range(counts.shape[1])))
    load = metrics.slot_load(counts, layer)
    assert np.array_equal(load, counts)
    assert np.allclose(metrics.slot_lis(load, counts.shape[1]), metrics.lis(counts))
    assert np.allclose(metrics.max_over_mean(counts), metrics.lis(counts))


def test_the_three_measures_differ():
    """One expert of two is busy and has two slots, on two ranks: three figures, three questions."""
    slots = (Slot(0, rank=0, share=0.5), Slot(0, rank=1, share=0.5), Slot(1, rank=1))
    load = metrics.slot_load([90, 10], LayerPlan(0, "", 2, slots))
    assert load.tolist() == [45, 45, 10]
    assert metrics.slot_lis(load, 2) == pytest.approx(2 * 45 / 100)  # below 1: more slots than experts
    assert metrics.max_over_mean(load) == pytest.approx(45 / (100 / 3))
    ranks = metrics.rank_load(load, LayerPlan(0, "", 2, slots), 2)
    assert ranks.tolist() == [45, 55]
    assert metrics.max_over_mean(ranks) == pytest.approx(55 / 50)


@settings(max_examples=50)
@given(st.data())
def test_ranks_hold_all_slots(data: st.DataObject):
    ranks = data.draw(st.integers(1, 4))
    layer = LayerPlan(0, "", 3, data.draw(layer_slots(3, ranks)))
    load = data.draw(hnp.arrays(np.float64, (2, len(layer.slots)), elements=st.floats(0, 1e6)))
    got = metrics.rank_load(load, layer, ranks)
    assert got.shape == (2, ranks)
    for rank in range(ranks):
        members = [s for s, slot in enumerate(layer.slots) if slot.rank == rank]
        assert np.allclose(got[:, rank], load[:, members].sum(-1))
