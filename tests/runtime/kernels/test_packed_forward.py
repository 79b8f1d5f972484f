"""The packed path against the formats' plain arithmetic, and models that carry packed weights."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from core_models import random_slots
from equipoise.models import find_layers
from equipoise.runtime import apply
from equipoise.runtime.kernels import onednn
from equipoise.runtime.kernels.packed import PackedWeight, can_pack
from equipoise.types import Slot
from families.families_support import make_plan
from runtime.kernels.kernel_cases import balanced, batch, width
from tiny import EXPERTS, FAMILIES

pytestmark = pytest.mark.skipif(
    not (can_pack(torch.int8) and can_pack(torch.bfloat16)), reason="no matrix instructions on this processor"
)


@torch.no_grad()
def test_weight_only_is_nearer_to_the_original_than_w8a8():
    original = FAMILIES["mixtral"](dtype=torch.bfloat16)
    layer = find_layers(original)[0]
    hidden, index, weights = batch(layer, 200)
    index.clamp_(max=EXPERTS - 1)
    wanted = layer.experts(hidden, index, weights).float()
    error = {}
    for precision in ("int8", "int8_weight_only"):
        model = FAMILIES["mixtral"](dtype=torch.bfloat16)
        apply(model, make_plan(model, lambda row, p=precision: [Slot(e, p) for e in range(EXPERTS)]))
        got = find_layers(model)[0].experts(hidden, index, weights).float()
        error[precision] = float((got - wanted).norm() / wanted.norm())
    assert 0 < error["int8_weight_only"] < error["int8"] < 0.06


@given(st.integers(1, 20_000))
def test_buckets(count: int):
    size = onednn.bucket(count)
    assert count <= size <= max(16, count + max(15, count // 8))
    assert size % 16 == 0
    assert onednn.bucket(size) == size


def test_there_are_few_buckets():
    assert len({onednn.bucket(count) for count in range(1, 8193)}) <= 72


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(tmp_path: Path):
    model = balanced("mixtral")
    held = [p for p in model.parameters() if isinstance(p, PackedWeight)]
    assert len(held) >= 2 * len(find_layers(model))
    ids = torch.randint(3, 120, (2, 9))
    model.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    for before, after in zip(find_layers(model), find_layers(loaded), strict=True):
        case = batch(before, 30)
        assert torch.equal(before.experts(*case), after.experts(*case))
    # Of two loaded models: a model cast to 16 bits holds its rotary frequencies so, a loaded one does not.
    wanted = loaded(input_ids=ids).logits
    loaded.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert sum(isinstance(p, PackedWeight) for p in again.parameters()) == len(held)
    assert torch.equal(again(input_ids=ids).logits, wanted)
    state = model.state_dict()
    assert not any(isinstance(tensor, PackedWeight) for tensor in state.values())
    again.load_state_dict(state)
    assert torch.equal(again(input_ids=ids).logits, wanted)


def test_what_runs_is_said(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="equipoise"):
        balanced("mixtral")
        apply(float32 := FAMILIES["mixtral"](), make_plan(float32, random_slots))
    text = caplog.text
    assert "packed for oneDNN" in text
    assert "run in plain operations" in text


@torch.no_grad()
def test_other_dtypes_and_devices_take_the_plain_path():
    model = FAMILIES["mixtral"]()
    apply(model, make_plan(model, random_slots))
    layer = find_layers(model)[0]
    assert not any(isinstance(p, PackedWeight) for p in model.parameters())
    assert not onednn.is_ready(layer.experts.equipoise_slots, torch.zeros(1, width(layer)))
    packed = balanced("mixtral")
    half = packed.half()  # a conversion unpacks
    assert half(input_ids=torch.tensor([[5, 6]])).logits.dtype == torch.float16
