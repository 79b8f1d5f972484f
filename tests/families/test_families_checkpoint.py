"""Checkpoints of every family: written shard by shard, loaded by plain transformers, equal to the model in memory."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families_support import (
    NAMES,
    identity_slots,
    is_routed,
    logits,
    make_plan,
    mixed_slots,
    own_model,
    padded,
    replica_slots,
    shared_model,
)
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from equipoise.checkpoint import apply_checkpoint
from equipoise.models import find_layers
from equipoise.models.loading import auto_class, find_source
from equipoise.runtime import apply, expert_bytes, plan_of
from equipoise.types import Slot
from tiny import build, save_tiny

IDS, MASK = padded([7, 12, 3, 9], "left")


@pytest.fixture(autouse=True)
def _small_heap() -> Iterator[None]:
    """Writing collects garbage after every layer; without what lives longer than the test that takes no time."""
    gc.freeze()
    yield
    gc.unfreeze()


def slots_of(row: int) -> list[Slot]:
    """All precisions in the first layer, replicas in the third, the second left as it is."""
    return [mixed_slots, identity_slots, replica_slots][row % 3](row)


def load(path: Path) -> torch.nn.Module:
    return auto_class(find_source(path).config).from_pretrained(path).eval()


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    out = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            out |= {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - not a dict
    return out


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_is_the_model_in_memory(name: str, tmp_path: Path):
    source = save_tiny(shared_model(name), tmp_path / "model", max_shard_size="128KB")
    memory = load(source)
    assert torch.equal(logits(memory, IDS, MASK), logits(shared_model(name), IDS, MASK))
    plan = make_plan(memory, slots_of)
    sizes = apply_checkpoint(source, plan, tmp_path / "balanced")
    apply(memory, plan)
    loaded = load(tmp_path / "balanced")

    assert torch.equal(logits(loaded, IDS, MASK), logits(memory, IDS, MASK))
    assert plan_of(loaded) == plan
    in_memory = dict(memory.named_parameters())
    assert {key for key, _ in loaded.named_parameters()} == set(in_memory)
    for key, parameter in loaded.named_parameters():
        assert parameter.dtype == in_memory[key].dtype, key
        assert torch.equal(parameter, in_memory[key]), key
    changed = {layer.name for layer in plan.layers if not layer.is_identity}
    assert sizes == {key: value for key, value in expert_bytes(memory).items() if key in changed}

    # Everything but the experts of the changed layers is on disk as it was, name by name.
    before, after = tensors_of(source), tensors_of(tmp_path / "balanced")
    layers = [layer for layer in find_layers(loaded) if layer.name in changed]
    for key, tensor in after.items():
        if not is_routed(key, layers) and key in before:
            assert torch.equal(tensor, before[key]), key
    assert len(set(before) & set(after)) > 10

    loaded.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(logits(again, IDS, MASK), logits(memory, IDS, MASK))
    assert plan_of(again) == plan


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v3", "nemotron_h", "qwen2_moe"])
def test_sixteen_bit_checkpoint(name: str, tmp_path: Path):
    source = save_tiny(build(name, dtype=torch.bfloat16), tmp_path / "model")
    memory = load(source)
    plan = make_plan(memory, slots_of)
    assert plan.model.dtype == "bfloat16"
    apply_checkpoint(source, plan, tmp_path / "balanced")
    apply(memory, plan)
    assert torch.equal(logits(load(tmp_path / "balanced"), IDS, MASK), logits(memory, IDS, MASK))


@pytest.mark.parametrize("name", ["mixtral", "switch_transformers", "qwen3_vl_moe"])
def test_the_tokenizer_comes_along(name: str, tmp_path: Path):
    source = save_tiny(shared_model(name), tmp_path / "model")
    apply_checkpoint(source, make_plan(own_model(name), slots_of), tmp_path / "balanced")
    for path in (source, tmp_path / "balanced"):
        assert AutoTokenizer.from_pretrained(path)("w9 w4").input_ids == [9, 4]


def test_identity_checkpoint_is_the_original(tmp_path: Path):
    source = save_tiny(shared_model("mixtral"), tmp_path / "model")
    model = own_model("mixtral")
    apply_checkpoint(source, make_plan(model, identity_slots), tmp_path / "balanced")
    before, after = tensors_of(source), tensors_of(tmp_path / "balanced")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(logits(load(tmp_path / "balanced"), IDS, MASK), logits(shared_model("mixtral"), IDS, MASK))


def test_plain_auto_class_loads_it_and_generates(tmp_path: Path):
    source = save_tiny(shared_model("qwen3_moe"), tmp_path / "model")
    apply_checkpoint(source, make_plan(own_model("qwen3_moe"), slots_of), tmp_path / "balanced")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "balanced")
    words = AutoTokenizer.from_pretrained(tmp_path / "balanced")("w5 w6 w7", return_tensors="pt")
    out = model.generate(input_ids=words.input_ids, do_sample=False, max_new_tokens=4, min_new_tokens=4)
    assert out.shape == (1, 7)
    config = json.loads((tmp_path / "balanced" / "config.json").read_text(encoding="utf-8"))
    assert config["experts_implementation"] == "equipoise"
    assert config["quantization_config"]["quant_method"] == "equipoise"
