"""A layer in one compiled call: the numbers of the other paths, and where it is taken."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from core_models import PACKABLE
from equipoise.models import find_layers
from equipoise.models.layout import Elementwise
from equipoise.runtime import packing
from equipoise.runtime.experts import plain_forward, slots_forward
from equipoise.runtime.kernels import few_rows, rows, vector
from runtime.kernels.kernel_cases import balanced, batch
from tiny import EXPERTS, FAMILIES

pytestmark = pytest.mark.skipif(not vector.suits_processor(), reason="not an x86 processor")

MADE = ["mixtral", "qwen2_moe", "nemotron_h", "switch_transformers"]
"""Gated, gated beside a shared expert, without a gate, and a dictionary of modules without a gate."""


@pytest.fixture(autouse=True)
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "can_pack", lambda _: False)


def other_path(slots: Any, *case: torch.Tensor) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, "MOST", -1)
        return slots_forward(slots, *case)


@pytest.mark.parametrize("family", MADE)
@pytest.mark.parametrize("precision", few_rows.PRECISIONS)
@torch.no_grad()
def test_the_bits_are_those_of_the_other_path(family: str, precision: str):
    for layer in find_layers(balanced(family, (precision,))):
        slots = layer.experts.equipoise_slots
        for tokens in (1, 2, 3, 50):
            case = batch(layer, tokens)
            assert few_rows.suits(slots, case[1].numel())
            assert torch.equal(slots_forward(slots, *case), other_path(slots, *case))
            if precision == "int8":
                assert torch.equal(slots_forward(slots, *case), plain_forward(slots, *case))


@given(st.integers(0, 30), st.integers(1, EXPERTS), st.integers(0, 9999))
@settings(max_examples=40, deadline=None)
@torch.no_grad()
def test_any_batch_of_a_layer_of_all_precisions(tokens: int, k: int, seed: int):
    """Dropped selections, an expert that is chosen twice, every expert, nobody."""
    layer = find_layers(_mixed())[0]
    slots = layer.experts.equipoise_slots
    draw = torch.Generator().manual_seed(seed)
    hidden = batch(layer, tokens, seed)[0]
    case = hidden, torch.randint(0, EXPERTS + 1, (tokens, k), generator=draw), torch.rand(tokens, k, generator=draw)
    assert torch.equal(slots_forward(slots, *case), other_path(slots, *case))


_made: list[Any] = []


def _mixed() -> Any:
    if not _made:
        _made.append(balanced("mixtral", PACKABLE))
    return _made[0]


@torch.no_grad()
def test_rows_that_are_not_contiguous():
    slots = find_layers(balanced("mixtral"))[0].experts.equipoise_slots
    hidden, index, weights = batch(find_layers(balanced("mixtral"))[0], 6)
    turned = hidden.t().contiguous().t(), index.t().contiguous().t(), weights.bfloat16().t().contiguous().t()
    wanted = slots_forward(slots, hidden, index, weights.bfloat16())
    assert torch.equal(slots_forward(slots, *turned), wanted)
    assert slots_forward(slots, *turned).is_contiguous()


def test_parameters_that_want_gradients():
    """As transformers makes those of a checkpoint."""
    layer = find_layers(_mixed())[0]
    slots, case = layer.experts.equipoise_slots, batch(find_layers(_mixed())[0], 3)
    with torch.no_grad():
        wanted = slots_forward(slots, *case)
    floats = [p for p in layer.experts.parameters() if p.is_floating_point()]
    for parameter in floats:
        parameter.requires_grad_(True)
    try:
        assert torch.equal(slots_forward(slots, *case), wanted)
    finally:
        for parameter in floats:
            parameter.requires_grad_(False)


@pytest.mark.parametrize("name", ["inf", "nan", "0", "1e-40"])
@torch.no_grad()
def test_tokens_that_have_no_scale(name: str):
    """As `formats.quantize_rows` has them: not finite stays so, too small becomes zero."""
    layer = find_layers(balanced("mixtral", ("int8",)))[0]
    slots = layer.experts.equipoise_slots
    hidden, index, weights = batch(layer, 4)
    index.clamp_(max=EXPERTS - 1)
    hidden[1] = float(name)
    got, wanted = slots_forward(slots, hidden, index, weights), plain_forward(slots, hidden, index, weights)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(), torch.relu, torch.tanh, lambda x: torch.relu(x).square()])
def test_the_table_is_the_activation(act: Any):
    found = few_rows.table(Elementwise("up", "down", act, False))
    assert found is not None
    assert found is few_rows.table(Elementwise("up", "down", act, False))
    every = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16)).view(torch.bfloat16)
    assert np.array_equal(found, rows.bits(act(every)))


def test_equal_activations_share_a_table():
    one, other = (few_rows.table(Elementwise("up", "down", nn.SiLU(), True)) for _ in range(2))
    assert one is other


@pytest.mark.parametrize("act", [lambda x: x.softmax(-1), lambda x: x.float(), lambda x: x + x.flip(-1)])
def test_no_table_of_what_looks_at_more_than_one_number(act: Any):
    assert few_rows.table(Elementwise("up", "down", act, False)) is None


@torch.no_grad()
def test_where_it_is_taken(monkeypatch: pytest.MonkeyPatch):
    slots = find_layers(balanced("mixtral"))[0].experts.equipoise_slots
    monkeypatch.setattr(few_rows, "MOST", 6 * sum(np.prod(weight.shape) for weight in slots.layout.weights))
    assert few_rows.suits(slots, 6)
    assert not few_rows.suits(slots, 7)
    # Biases, interleaved halves, [in, out]: all of GPT-OSS is something else.
    assert not few_rows.suits(find_layers(balanced("gpt_oss"))[0].experts.equipoise_slots, 1)


def test_families_that_the_path_is_for():
    """Most are a gate of the family's own away from each other; which ones are not must not change unseen."""
    without = {name for name, make in FAMILIES.items() if find_layers(make())[0].layout.elementwise is None}
    assert "mixtral" not in without
    assert "gpt_oss" in without
    assert len(without) < len(FAMILIES) / 2


def _rescale(slots: Any) -> None:
    slots.write("down_proj", 0, {"": 3 * slots.read("down_proj", 0)[""]})


def _new_data(slots: Any) -> None:
    for parameter in slots.layout.module._parameters.values():
        parameter.data = parameter.data.clone() if parameter.dtype == torch.int8 else 2 * parameter.data


def _new_parameters(slots: Any) -> None:
    parameters = slots.layout.module._parameters
    for name, parameter in parameters.items():
        parameters[name] = nn.Parameter(parameter.detach().roll(1, 0), requires_grad=False)


def _new_table(slots: Any) -> None:
    served = [[s for s, slot in enumerate(slots.table.layer.slots) if slot.expert == e] for e in range(EXPERTS)]
    slots.table = slots.table.rerouted([slots[::-1] for slots in served])


@pytest.mark.parametrize("change", [_rescale, _new_data, _new_parameters, _new_table])
@torch.no_grad()
def test_what_changes_between_forwards_is_seen(change: Any):
    layer = find_layers(balanced("mixtral", PACKABLE))[0]
    slots = layer.experts.equipoise_slots
    case = batch(layer, 6)
    first = slots_forward(slots, *case)
    assert few_rows.ready(slots, case[0], case[1].numel()) is not None
    assert torch.equal(slots_forward(slots, *case), first)
    change(slots)
    after = slots_forward(slots, *case)
    assert torch.equal(after, other_path(slots, *case))
    assert not torch.equal(after, first)
    assert few_rows.ready(slots, case[0], case[1].numel()) is not None


@torch.no_grad()
def test_a_copy_of_a_model_computes_with_its_own_weights():
    model = balanced("mixtral", PACKABLE)
    layer = find_layers(model)[0]
    case = batch(layer, 6)
    first = slots_forward(layer.experts.equipoise_slots, *case)
    twin = find_layers(copy.deepcopy(model))[0].experts.equipoise_slots
    assert torch.equal(slots_forward(twin, *case), first)
    _new_data(twin)
    assert not torch.equal(slots_forward(twin, *case), first)
    assert torch.equal(slots_forward(layer.experts.equipoise_slots, *case), first)


@torch.no_grad()
def test_nothing_of_a_layer_is_kept_when_it_goes():
    model = balanced("mixtral")
    layer = find_layers(model)[0]
    slots_forward(layer.experts.equipoise_slots, *batch(layer, 2))
    stored = weakref.ref(next(iter(layer.experts.parameters())))
    few_rows.forget(layer.experts.equipoise_slots)
    assert few_rows.ready(layer.experts.equipoise_slots, *batch(layer, 2)[:1], 2) is None
    slots_forward(layer.experts.equipoise_slots, *batch(layer, 2))
    del model, layer
    gc.collect()
    assert stored() is None
