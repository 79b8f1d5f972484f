"""The compiled row kernels against the tensor operations that say what they compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core_models import PACKABLE, random_slots
from equipoise.formats import quantize_rows
from equipoise.runtime.kernels import rows
from equipoise.runtime.slots import SlotTable
from equipoise.types import LayerPlan
from tiny import EXPERTS

SIZES = st.tuples(st.integers(0, 9), st.integers(1, 40))


def drawn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """bfloat16 of many magnitudes, with zeros."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw) * 10.0 ** torch.randint(-6, 6, (*shape[:-1], 1), generator=draw)
    return (x * (torch.rand(shape, generator=draw) > 0.1)).bfloat16()


@given(SIZES, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_quantize_is_the_formats_own(shape: tuple[int, int], seed: int):
    x = drawn(shape, seed)
    q, scale = torch.empty(shape, dtype=torch.int8), torch.empty(shape[0])
    rows.quantize(rows.bits(x), q.numpy(), scale.numpy())
    wanted, scales = quantize_rows(x)
    assert torch.equal(q, wanted)
    assert torch.equal(scale, scales[:, 0])


@given(SIZES, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_two_digits_hold_sixteen_bits(shape: tuple[int, int], seed: int):
    x = drawn(shape, seed)
    q, scale = torch.empty((2, *shape), dtype=torch.int8), torch.empty(shape[0])
    rows.quantize_two(rows.bits(x), q.numpy(), scale.numpy())
    back = scale[:, None] * (q[0].float() + q[1].float() / 254)
    assert bool(((back - x.float()).abs() <= scale[:, None] * (0.5 / 254 + 1e-5)).all())


@given(SIZES, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_scaling_rounds_as_torch_does(shape: tuple[int, int], seed: int):
    x, scale = drawn(shape, seed), torch.rand(shape[0])
    wanted = (x.float() * scale[:, None]).bfloat16()
    rows.scale_rows(rows.bits(x), scale.numpy())
    assert torch.equal(x, wanted)


@given(SIZES, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_merging_two_products(shape: tuple[int, int], seed: int):
    n, width = shape
    y, scale = torch.randn(2 * n, width, generator=torch.Generator().manual_seed(seed)), torch.rand(n)
    out = torch.empty(shape, dtype=torch.bfloat16)
    rows.merge_two(y.numpy(), scale.numpy(), rows.bits(out))
    wanted = ((y[:n].double() + y[n:].double() / 254) * scale[:, None].double()).float()
    torch.testing.assert_close(out.float(), wanted, rtol=2**-8, atol=1e-6)


@given(st.integers(0, 12), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_combine_sums_what_was_kept(tokens: int, k: int, seed: int):
    draw = np.random.default_rng(seed)
    kept = draw.random(tokens * k) > 0.2
    place = np.where(kept, np.cumsum(kept) - 1, -1)
    y, weights = drawn((int(kept.sum()), 7), seed), torch.rand(tokens, k)
    out = torch.empty(tokens, 7, dtype=torch.bfloat16)
    rows.combine(rows.bits(y), weights.numpy(), place, rows.bits(out))
    wanted = torch.zeros(tokens, 7)
    for t in range(tokens):
        for j in range(k):
            if place[t * k + j] >= 0:
                wanted[t] += weights[t, j] * y[place[t * k + j]].float()
    largest = float(y.float().abs().max()) if len(y) else 1.0
    torch.testing.assert_close(out.float(), wanted, rtol=2**-8, atol=1e-6 * largest)


@given(st.integers(0, 40), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_sorting_is_the_assignment_of_the_table(tokens: int, k: int, seed: int):
    table = SlotTable(LayerPlan(0, "experts", EXPERTS, tuple(random_slots(seed, PACKABLE))))
    index = torch.randint(0, EXPERTS + 1, (tokens, k), generator=torch.Generator().manual_seed(seed))
    token, place, counts = table.sort(index)
    slots = table.assign(index).reshape(-1)
    order = [s for pool in table.pools.values() for s in pool]
    assert counts == [int((slots == s).sum()) for s in order]
    assert (place >= 0).tolist() == (slots < table.num_slots).tolist()
    at = np.repeat(order, counts)  # slot of each row
    for selection, row in enumerate(place):
        if row >= 0:
            assert at[row] == slots[selection]
            assert token[row] == selection // k
    # Within a slot the order of the batch is kept.
    for s in order:
        inside = place[(slots == s).numpy()]
        assert (np.diff(inside) == 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_damaged_row_stays_alone(bad: float):
    x = torch.ones(3, 8, dtype=torch.bfloat16)
    x[1, 5] = bad
    q, scale = torch.empty(3, 8, dtype=torch.int8), torch.empty(3)
    rows.quantize(rows.bits(x), q.numpy(), scale.numpy())
    assert torch.isfinite(scale).tolist() == [True, False, True]
    assert torch.isfinite(quantize_rows(x)[1][:, 0]).tolist() == [True, False, True]
