"""The packed path against the formats' plain arithmetic, and models that carry packed weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from core_models import PACKABLE, random_slots
from equipoise.models import MoELayer, find_layers
from equipoise.runtime import apply
from equipoise.runtime.experts import plain_forward, slots_forward
from equipoise.runtime.kernels import cpu
from equipoise.runtime.kernels.packed import PackedWeight, can_pack
from equipoise.types import Slot
from families.families_support import make_plan
from tiny import EXPERTS, FAMILIES

pytestmark = pytest.mark.skipif(
    not (can_pack(torch.int8) and can_pack(torch.bfloat16)), reason="no matrix instructions on this processor"
)
KINDS = ["mixtral", "gpt_oss", "nemotron_h", "qwen2_moe"]


def balanced(family: str, precisions: tuple[str, ...] = PACKABLE) -> Any:
    model = FAMILIES[family](dtype=torch.bfloat16)
    return apply(model, make_plan(model, lambda row: random_slots(row, precisions)))


def width(layer: MoELayer) -> int:
    weight = layer.layout.weights[0]
    return weight.shape[-2] if weight.out_axis == -1 else weight.shape[-1]


def batch(layer: MoELayer, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width(layer), generator=draw).bfloat16()
    return hidden, torch.randint(0, EXPERTS + 1, (tokens, 2), generator=draw), torch.rand(tokens, 2, generator=draw)


@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_it_computes_what_the_formats_say(family: str):
    for layer in find_layers(balanced(family)):
        slots = layer.experts.equipoise_slots
        for tokens in (1, 7, 90):
            hidden, index, weights = batch(layer, tokens)
            assert cpu.is_ready(slots, hidden)
            got, wanted = slots_forward(slots, hidden, index, weights), plain_forward(slots, hidden, index, weights)
            assert got.dtype == torch.bfloat16
            assert (got - wanted).float().norm() <= 0.01 * wanted.float().norm()


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
    size = cpu.bucket(count)
    assert count <= size <= max(16, count + max(15, count // 8))
    assert size % 16 == 0
    assert cpu.bucket(size) == size


def test_there_are_few_buckets():
    assert len({cpu.bucket(count) for count in range(1, 8193)}) <= 72


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 60))
@settings(deadline=None)
def test_groups_hold_every_row_once(counts: list[int], limit: int):
    groups = cpu._groups(counts, limit)
    assert [(s.place, s.count) for segments, _ in groups for s in segments] == [
        (place, count) for place, count in enumerate(counts) if count
    ]
    for segments, total in groups:
        assert [s.begin for s in segments] == [sum(t.count for t in segments[:i]) for i in range(len(segments))]
        assert total == sum(s.count for s in segments)
        assert total <= limit or len(segments) == 1


@torch.no_grad()
def test_groups_change_nothing(monkeypatch: pytest.MonkeyPatch):
    layer = find_layers(balanced("mixtral", ("int8",)))[0]
    case = batch(layer, 60)
    whole = slots_forward(layer.experts.equipoise_slots, *case)
    monkeypatch.setattr(cpu, "GROUP_BYTES", 1)
    assert torch.equal(slots_forward(layer.experts.equipoise_slots, *case), whole)


@torch.no_grad()
def test_int8_rows_do_not_depend_on_their_batch():
    layer = find_layers(balanced("mixtral", ("int8",)))[0]
    slots = layer.experts.equipoise_slots
    for slot in slots.table.rerouted([[s] for s in _first_slots(slots.table)]).pools:
        assert slot == "int8"
    hidden, index, weights = batch(layer, 40)
    # Every slot of an expert holds the same integers, so whichever takes a row gives the same bits.
    together = slots_forward(slots, hidden, index, weights)
    alone = torch.cat(
        [slots_forward(slots, hidden[t : t + 1], index[t : t + 1], weights[t : t + 1]) for t in range(len(hidden))]
    )
    assert torch.equal(together, alone)


def _first_slots(table: Any) -> list[int]:
    first: dict[int, int] = {}
    for s, slot in enumerate(table.layer.slots):
        first.setdefault(slot.expert, s)
    return [first[e] for e in range(table.num_experts)]


@torch.no_grad()
def test_a_damaged_token_stays_alone():
    layer = find_layers(balanced("mixtral"))[0]
    slots = layer.experts.equipoise_slots
    hidden, index, weights = batch(layer, 30)
    index.clamp_(max=EXPERTS - 1)
    clean = slots_forward(slots, hidden, index, weights)
    hidden[4, 3] = float("nan")
    found = slots_forward(slots, hidden, index, weights)
    others = torch.arange(30) != 4
    assert torch.isnan(found[4]).all()
    assert torch.isfinite(found[others]).all()
    torch.testing.assert_close(found[others], clean[others], rtol=0.02, atol=0.02)


@torch.no_grad()
def test_every_expert_chosen_and_none():
    layer = find_layers(balanced("mixtral"))[0]
    slots = layer.experts.equipoise_slots
    hidden, _, _ = batch(layer, 5)
    everyone = torch.arange(EXPERTS).expand(5, EXPERTS)  # k = E
    weights = torch.full((5, EXPERTS), 1 / EXPERTS)
    got, wanted = slots_forward(slots, hidden, everyone, weights), plain_forward(slots, hidden, everyone, weights)
    assert (got - wanted).float().norm() <= 0.01 * wanted.float().norm()
    assert not slots_forward(slots, hidden, torch.full((5, 2), EXPERTS), torch.ones(5, 2)).any()
    nothing = slots_forward(slots, hidden[:0], everyone[:0], weights[:0])
    assert nothing.shape == (0, hidden.shape[1])


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


def test_gradients_are_refused_when_they_are_asked_for():
    model = balanced("mixtral")
    ids = torch.randint(3, 120, (1, 6))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    logits = model(input_ids=ids).logits
    assert torch.equal(logits, wanted)
    with pytest.raises(RuntimeError, match="for inference"):
        logits.sum().backward()


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
    assert not cpu.is_ready(layer.experts.equipoise_slots, torch.zeros(1, width(layer)))
    packed = balanced("mixtral")
    half = packed.half()  # a conversion unpacks
    assert half(input_ids=torch.tensor([[5, 6]])).logits.dtype == torch.float16
