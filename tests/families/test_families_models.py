"""The tiny models themselves: complete, deterministic, and with routing that is worth balancing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from families_support import NAMES, logits, padded, reading_routers, shared_model, text

from equipoise.models import find_layers
from tiny import EXPERTS, FAMILIES, LEFT_OUT, NATIVE, build, tiny_tokenizer


def test_every_dispatched_modeling_file_has_a_model_or_a_reason():
    root = Path(transformers.__file__).parent / "models"
    dispatched = {
        path.parent.name
        for path in root.glob("*/modeling_*.py")
        if re.search(r"^@use_experts_implementation", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(dispatched) > 50
    assert dispatched | {"switch_transformers"} | set(NATIVE) == set(FAMILIES) | set(LEFT_OUT)
    assert not set(FAMILIES) & set(LEFT_OUT)


@pytest.mark.parametrize("name", NAMES)
def test_moe_layers_are_found(name: str):
    model = shared_model(name)
    layers = find_layers(model)
    assert len(layers) >= 2
    for layer in layers:
        assert layer.num_experts == EXPERTS
        assert model.get_submodule(layer.name) is layer.experts
        assert f".{layer.layer_id}." in f".{layer.name}" or model.config.is_encoder_decoder
    names = [(layer.layer_id, layer.name) for layer in layers]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", NAMES)
def test_routing_is_uneven_and_spread(name: str):
    model = shared_model(name)
    with reading_routers(model) as log:
        out = logits(model, text(4, 16))
    assert out.isfinite().all()
    counts = log.counts()
    used = counts.sum(1) > 0
    assert used.sum() >= 2
    for row, calls in zip(counts[used], [c for c in log.calls if c], strict=True):
        k = calls[0].shape[1]
        assert (row > 0).sum() > k
        assert row.max() * EXPERTS > 1.2 * row.sum()


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "switch_transformers"])
def test_models_are_seeded(name: str):
    ids, mask = padded([5, 9], "left")
    assert torch.equal(logits(build(name), ids, mask), logits(shared_model(name), ids, mask))
    assert not torch.equal(logits(build(name, seed=1), ids, mask), logits(shared_model(name), ids, mask))


def test_dtype_of_the_weights():
    model = build("olmoe", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16


def test_the_tokenizer_makes_the_ids_of_the_models():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("w5 w17 w127").input_ids
    assert ids == [5, 17, 127]
    assert tokenizer.pad_token_id == 0
