"""The forward of a balanced layer against a loop over tokens, one selection at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from core_models import random_slots
from equipoise.formats import get_format
from equipoise.models import MoELayer, find_layers
from equipoise.runtime import apply
from equipoise.runtime.experts import Slots, slots_forward
from equipoise.runtime.kernels.packed import PackedWeight
from equipoise.types import Slot
from families.families_support import make_plan
from tiny import EXPERTS, FAMILIES

LOOPED = ["mixtral", "gpt_oss", "nemotron_h", "switch_transformers", "qwen2_moe"]


def one_by_one(
    original: MoELayer, balanced: MoELayer, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """[T, H]: each selection alone, with the weights its slot's format makes of the untouched expert."""
    table = balanced.experts.equipoise_slots.table
    slots = table.assign(index)
    out = torch.zeros_like(hidden)
    for t in range(len(hidden)):
        for j in range(index.shape[1]):
            if index[t, j] == EXPERTS:
                continue
            slot = table.layer.slots[int(slots[t, j])]
            assert slot.expert == index[t, j]

            def linear(name: str, x: torch.Tensor, slot: Slot = slot) -> torch.Tensor:
                weight, form = original.layout.weight(name), get_format(slot.precision)
                stored = form.encode(original.layout.expert(name, slot.expert).detach(), weight.out_axis)
                y = form.linear(x, stored, weight.out_axis)
                return y if weight.bias is None else y + original.layout.expert(weight.bias, slot.expert).detach()

            y, _ = original.layout.compute(hidden[t : t + 1], linear)
            out[t] += (weights[t, j] * y[0]).to(out.dtype)
    return out


@pytest.mark.parametrize("family", LOOPED)
@torch.no_grad()
def test_against_a_loop(family: str):
    untouched, model = FAMILIES[family](), FAMILIES[family]()
    apply(model, make_plan(model, random_slots))
    draw = torch.Generator().manual_seed(3)
    for before, after in zip(find_layers(untouched), find_layers(model), strict=True):
        width = before.layout.expert(before.layout.weights[0].name, 0).shape
        width = width[-2] if before.layout.weights[0].out_axis == -1 else width[-1]
        k = 1 if family == "switch_transformers" else 2
        hidden = torch.randn(17, width, generator=draw)
        # One in nine selections is dropped; expert 3 gets no token at all.
        index = torch.randint(0, EXPERTS + 1, (17, k), generator=draw)
        index[index == 3] = 4
        weights = torch.rand(17, k, generator=draw)
        got = slots_forward(after.experts.equipoise_slots, hidden, index, weights)
        wanted = one_by_one(before, after, hidden, index, weights)
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_dropped_selections_add_nothing():
    model = FAMILIES["mixtral"]()
    apply(model, make_plan(model, random_slots))
    slots = find_layers(model)[0].experts.equipoise_slots
    hidden, weights = torch.randn(5, 32), torch.rand(5, 2)
    assert not slots_forward(slots, hidden, torch.full((5, 2), EXPERTS), weights).any()
    index = torch.tensor([[0, EXPERTS]] * 5)
    alone = slots_forward(slots, hidden, index[:, :1], weights[:, :1])
    assert torch.equal(slots_forward(slots, hidden, index, weights), alone)


@torch.no_grad()
def test_no_rows():
    model = FAMILIES["mixtral"]()
    apply(model, make_plan(model, random_slots))
    slots = find_layers(model)[0].experts.equipoise_slots
    out = slots_forward(slots, torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert out.shape == (0, 32)


@torch.no_grad()
def test_sixteen_bit_stays_sixteen_bit():
    model = FAMILIES["qwen3_moe"](dtype=torch.bfloat16)
    apply(model, make_plan(model, random_slots))
    slots = find_layers(model)[0].experts.equipoise_slots
    hidden, index = torch.randn(6, 32, dtype=torch.bfloat16), torch.randint(0, EXPERTS, (6, 2))
    for dtype in (torch.float32, torch.bfloat16):  # families differ in the dtype of their routing weights
        assert slots_forward(slots, hidden, index, torch.rand(6, 2).to(dtype)).dtype == torch.bfloat16


@torch.no_grad()
def test_the_same_batch_gives_the_same_bits():
    model = FAMILIES["olmoe"]()
    apply(model, make_plan(model, random_slots))
    ids = torch.randint(3, 120, (4, 16))
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")
def test_packed_weights_become_plain_where_the_model_goes():
    """`Module.to` keeps the packed object, whose packs are the CPU's: the first forward elsewhere replaces it."""
    weight = torch.randint(-127, 128, (2, 64, 32), dtype=torch.int8)
    module = nn.Module()
    module.down_int8 = nn.Parameter(PackedWeight.pack(weight, -2), requires_grad=False)
    module.bias = nn.Parameter(torch.ones(3))
    bias = module.bias
    slots = Slots.__new__(Slots)
    slots.layout = SimpleNamespace(module=module)  # type: ignore[assignment]
    slots.leave_cpu(torch.device("cpu"))
    assert type(module.down_int8) is nn.Parameter
    assert not isinstance(module.down_int8.data, PackedWeight)
    assert torch.equal(module.down_int8, weight)
    assert not module.down_int8.requires_grad
    assert module.bias is bias
