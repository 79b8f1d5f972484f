"""Which slot a token goes to, against a simulation one selection at a time."""

from __future__ import annotations

import copy
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core_cases import layer_slots
from core_models import random_slots
from equipoise.runtime.slots import LONGEST, SlotTable, share_pattern
from equipoise.types import LayerPlan, Slot
from tiny import EXPERTS


def table(*slots: Slot) -> SlotTable:
    return SlotTable(LayerPlan(0, "", 1 + max(slot.expert for slot in slots), slots))


def fractions(shares: list[float]) -> np.ndarray:
    """The shares that a pattern really gives."""
    pattern = share_pattern(np.array(shares))
    return np.bincount(pattern, minlength=len(shares)) / len(pattern)


@settings(deadline=None, max_examples=120)
@given(st.data())
def test_assign_against_a_simulation(data: st.DataObject):
    experts, k = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    layer = LayerPlan(0, "", experts, data.draw(layer_slots(experts)))
    seed, rows = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.integers(0, 60))
    # Expert number E marks a dropped selection.
    index = torch.from_numpy(np.random.default_rng(seed).integers(0, experts + 1, (rows, k)))
    assigned = SlotTable(layer).assign(index)
    assert assigned.shape == index.shape
    assert assigned.dtype == torch.int64

    members = {e: [s for s, slot in enumerate(layer.slots) if slot.expert == e] for e in range(experts)}
    taken: dict[int, dict[int, int]] = {e: dict.fromkeys(members[e], 0) for e in range(experts)}
    for expert, slot in zip(index.reshape(-1).tolist(), assigned.reshape(-1).tolist(), strict=True):
        if expert == experts:
            assert slot == len(layer.slots)
            continue
        taken[expert][slot] += 1  # a KeyError here: the slot is another expert's
        n = sum(taken[expert].values())
        shares = [layer.slots[s].share for s in members[expert]]
        for s, wanted, exact in zip(members[expert], fractions(shares), shares, strict=True):
            assert abs(taken[expert][s] - n * wanted) < 1
            assert abs(taken[expert][s] - n * exact) < 1 + n / LONGEST
        if np.allclose(shares, shares[0]):
            assert max(taken[expert].values()) - min(taken[expert].values()) <= 1

    again = SlotTable(layer)
    assert torch.equal(again.assign(index), assigned)
    assert torch.equal(again.assign(index), assigned)  # nothing is kept from batch to batch


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=12))
def test_every_prefix_is_within_one_token_of_the_shares(parts: list[int]):
    shares = np.array(parts) / sum(parts)
    pattern = share_pattern(shares)
    assert len(pattern) <= LONGEST
    real = np.bincount(pattern, minlength=len(parts)) / len(pattern)
    assert np.abs(real - shares).max() < 1 / LONGEST
    taken = np.eye(len(parts))[np.tile(pattern, 2)].cumsum(0)
    n = np.arange(1, 2 * len(pattern) + 1)[:, None]
    assert np.abs(taken - n * real).max() < 1
    assert np.abs(taken - n * shares).max() < 1 + 2 * len(pattern) / LONGEST


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_fractions_of_small_numbers_are_met_exactly(parts: list[int]):
    shares = [part / sum(parts) for part in parts]
    assert np.allclose(fractions(shares), shares, atol=1e-8)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_even_shares_take_turns(count: int):
    assert share_pattern(np.full(count, 1 / count)).tolist() == list(range(count))


def test_pattern_of_more_slots_than_its_length():
    shares = np.linspace(1, 2, 400)
    pattern = share_pattern(shares / shares.sum())
    assert len(pattern) == 400
    assert pattern.max() < 400


def test_a_single_token_meets_the_original_weights():
    slots = table(Slot(0, share=0.5), Slot(0, "int8", share=0.5), Slot(1))
    assert slots.assign(torch.tensor([[0, 1]])).tolist() == [[0, 2]]


def test_row_order_then_order_of_the_selections():
    slots = table(*(Slot(0, share=1 / 3) for _ in range(3)))
    assert slots.assign(torch.zeros(2, 2, dtype=torch.int64)).tolist() == [[0, 1], [2, 0]]


def test_pools_number_the_slots_of_a_precision():
    slots = table(Slot(0, share=0.5), Slot(0, "int8", share=0.5), Slot(1, "int8"), Slot(2), Slot(3, "float16"))
    assert slots.pools == {"original": [0, 3], "int8": [1, 2], "float16": [4]}
    assert slots.pool_index == [0, 0, 1, 1, 0]


def test_nothing_to_assign():
    slots = table(Slot(0), Slot(1, share=0.5), Slot(1, share=0.5))
    assert slots.assign(torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 2)


def test_a_skeleton_on_the_meta_device_has_a_real_table():
    with torch.device("meta"):
        slots = table(Slot(0, share=0.5), Slot(0, share=0.5), Slot(1))
    assert slots.assign(torch.tensor([[0], [0], [1], [2]])).tolist() == [[0], [1], [2], [3]]


def test_copies_are_independent_and_equal():
    slots = table(Slot(0, share=0.75), Slot(0, share=0.25), Slot(1))
    index = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (50, 2)))
    assert torch.equal(copy.deepcopy(slots).assign(index), slots.assign(index))


def test_loads_add_up_on_a_large_batch():
    slots = table(Slot(0, share=0.3), Slot(0, share=0.7), Slot(1), Slot(2, share=0.5), Slot(2, share=0.5))
    index = torch.from_numpy(np.random.default_rng(1).integers(0, 3, (20_000, 2)))
    loads: dict[int, int] = defaultdict(int)
    for slot in slots.assign(index).reshape(-1).tolist():
        loads[slot] += 1
    counts = torch.bincount(index.reshape(-1)).tolist()
    assert [loads[0] + loads[1], loads[2], loads[3] + loads[4]] == counts
    assert abs(loads[0] - 0.3 * counts[0]) < 1
    assert abs(loads[3] - loads[4]) <= 1


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), masked=st.booleans())
def test_counting_is_the_assignment_of_the_real_tokens(seed, masked):
    draw = np.random.default_rng(seed)
    layer = LayerPlan(0, "", EXPERTS, tuple(sorted(random_slots(seed), key=lambda s: s.expert)))
    made = SlotTable(layer)
    index = torch.from_numpy(draw.integers(0, EXPERTS + 1, (draw.integers(0, 30), 3)))
    real = torch.from_numpy(draw.random(len(index)) < 0.7) if masked else None
    experts, slots = np.ones(EXPERTS + 1, dtype=np.int64), np.ones(made.num_slots + 1, dtype=np.int64)
    made.count(index, real, experts, slots)
    kept = np.ones(len(index), dtype=bool) if real is None else real.numpy()
    assert np.array_equal(experts - 1, np.bincount(index.numpy()[kept].ravel(), minlength=EXPERTS + 1))
    wanted = np.bincount(made.assign(index).numpy()[kept].ravel(), minlength=made.num_slots + 1)
    assert np.array_equal(slots - 1, wanted)
