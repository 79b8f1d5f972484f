"""Finding and loading models: names, skeletons without weights, and layers that a plan can name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from equipoise.checkpoint import apply_checkpoint
from equipoise.errors import InputError
from equipoise.models import empty_model, find_layers, load_model
from equipoise.models.loading import find_source
from families.families_support import make_plan, replica_slots
from tiny import EXPERTS, FAMILIES, save_tiny


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_tiny(FAMILIES["mixtral"](dtype=torch.bfloat16), tmp_path / "model")


def test_skeleton_has_layers_and_no_weights(saved: Path):
    source = find_source(saved)
    skeleton = empty_model(source)
    assert all(p.is_meta for p in skeleton.parameters())
    layers = find_layers(skeleton)
    assert [layer.layer_id for layer in layers] == [0, 1, 2]
    assert {layer.num_experts for layer in layers} == {EXPERTS}
    assert {layer.layout.dtype for layer in layers} == {torch.bfloat16}
    assert [layer.name for layer in layers] == [layer.name for layer in find_layers(load_model(saved).model)]


def test_dtype_of_a_config_that_names_none_is_that_of_the_weights(saved: Path):
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    config.pop("dtype", None)
    config.pop("torch_dtype", None)
    (saved / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert find_layers(empty_model(find_source(saved)))[0].layout.dtype == torch.bfloat16
    (saved / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no safetensors weights"):
        empty_model(find_source(saved))


def test_encoder_and_decoder_layers_have_numbers_of_their_own():
    layers = find_layers(FAMILIES["switch_transformers"]())
    assert len({layer.layer_id for layer in layers}) == len(layers) == 2
    assert layers[0].name.startswith("encoder.")
    assert layers[1].name.startswith("decoder.")
    assert layers[1].layer_id >= 2


def test_a_balanced_checkpoint_is_known_and_refused_as_a_start(saved: Path, tmp_path: Path):
    plan = make_plan(load_model(saved).model, replica_slots)
    apply_checkpoint(saved, plan, tmp_path / "out")
    assert find_source(tmp_path / "out").is_balanced
    assert not find_source(saved).is_balanced
    with pytest.raises(InputError, match="is balanced already"):
        empty_model(find_source(tmp_path / "out"))
    layers = find_layers(load_model(tmp_path / "out").model)
    assert [(layer.layer_id, layer.num_experts) for layer in layers] == [(i, EXPERTS) for i in range(3)]


def test_a_quantized_checkpoint_is_refused(saved: Path):
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (saved / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=r"is quantized already \(bitsandbytes\)"):
        empty_model(find_source(saved))


def test_layers_with_different_numbers_of_experts_are_refused():
    model = FAMILIES["mixtral"]()
    experts = find_layers(model)[1].experts
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, nn.Parameter(getattr(experts, name)[:4].detach().clone()))
    with pytest.raises(InputError, match=r"layers with \[4, 8\] experts"):
        find_layers(model)


def test_logging_of_transformers_is_left_as_it_was(saved: Path):
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    load_model(saved)
    with pytest.raises(InputError):
        load_model(saved.parent / "nothing")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
