"""Layers lowered whole, against the model with a plan applied to that layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from equipoise.errors import InputError
from equipoise.models import find_layers
from equipoise.options import ProfileOptions
from equipoise.profiling import profile
from equipoise.profiling.importance import shared_out
from equipoise.profiling.lowered import lowered, lowered_divergence
from equipoise.runtime import apply
from equipoise.types import Slot
from families.families_support import make_plan
from profiling.test_importance_core import inputs_of
from profiling.test_sensitivity import state
from tiny import EXPERTS, FAMILIES

CASES = ["mixtral", "gpt_oss", "deepseek_v3", "qwen2_moe", "switch_transformers", "nemotron_h"]


def called(model: Any, seed: int = 0) -> dict[str, Any]:
    """What `profile` calls a model with."""
    own = {} if model.config.is_encoder_decoder else {"use_cache": False}
    return {**inputs_of(model, seed), **own}


@torch.no_grad()
def log_predictions(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Float64 log-probabilities [tokens, V] of what is not padding."""
    mask = inputs["decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask"]
    return model(**inputs).logits[mask.bool()].double().log_softmax(-1)


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "int8"), (torch.bfloat16, "int8_weight_only")])
def test_it_is_the_divergence_of_a_plan_that_lowers_the_layer(family: str, dtype: torch.dtype, precision: str):
    model = FAMILIES[family](dtype=dtype)
    batches = [called(model, 0), called(model, 1)]
    layers = find_layers(model)
    found = lowered_divergence(model, layers, batches, precision)
    wide = FAMILIES[family](dtype=dtype).float()
    before = [log_predictions(wide, batch) for batch in batches]
    for row in range(len(layers)):

        def slots(at: int, row: int = row) -> list[Slot]:
            return [Slot(e, precision if at == row else "original") for e in range(EXPERTS)]

        other = FAMILIES[family](dtype=dtype)
        apply(other, make_plan(other, slots)).float()
        total = 0.0
        for p, batch in zip(before, batches, strict=True):
            total += float((p.exp() * (p - log_predictions(other, batch))).sum())
        wanted = total / sum(len(p) for p in before)
        assert found[row] == pytest.approx(wanted, rel=1e-3, abs=1e-9)
    assert found.max() > 0


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_the_model_is_left_as_it_was(family: str):
    model = FAMILIES[family](dtype=torch.bfloat16)
    before, weights = state(model), {name: p.clone() for name, p in model.named_parameters()}
    lowered_divergence(model, find_layers(model), [called(model)], "int8")
    assert state(model) == before
    assert [name for name, _ in model.named_parameters()] == list(weights)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not any(m._state_dict_hooks for m in model.modules())


@torch.no_grad()
def test_some_experts_only():
    """Tokens that meet none of them are computed as before, up to the order of sums."""
    model = FAMILIES["mixtral"]()
    layer = find_layers(model)[0]
    hidden, weights = torch.randn(40, model.config.hidden_size), torch.rand(40, 2)
    index = torch.stack([torch.arange(40) % EXPERTS, (torch.arange(40) + 1) % EXPERTS], 1)
    before = layer.experts(hidden, index, weights)
    with lowered(layer, "int8", [2]):
        after = layer.experts(hidden, index, weights)
    meets = (index == 2).any(1)
    torch.testing.assert_close(after[~meets], before[~meets], rtol=1e-5, atol=1e-6)
    assert bool((after != before)[meets].any(1).all())


def test_padding_does_not_count():
    model = FAMILIES["mixtral"]()
    inputs = called(model)
    pad = torch.full((len(inputs["input_ids"]), 4), 3)
    wide = {
        "input_ids": torch.cat([inputs["input_ids"], pad], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.zeros_like(pad)], 1),
        "use_cache": False,
    }
    layers = find_layers(model)
    first, second = (lowered_divergence(model, layers, [x], "int8") for x in (inputs, wide))
    np.testing.assert_allclose(second, first, rtol=1e-3)


def test_a_weight_beyond_the_precision_is_named():
    model = FAMILIES["mixtral"]()
    with torch.no_grad():
        find_layers(model)[1].layout.expert("down_proj", 2)[0, 0] = 1e6
    with pytest.raises(InputError, match=r"layer 1, expert 2, down_proj.*does not fit float16"):
        lowered_divergence(model, find_layers(model), [called(model)], "float16")


def test_a_profile_shares_it_out():
    model = FAMILIES["mixtral"](dtype=torch.bfloat16)
    batches = [inputs_of(model, seed) for seed in range(3)]
    whole = profile(model, batches)
    gradients = profile(model, batches, ProfileOptions(layer_tokens=0))
    assert (whole.meta["error"], gradients.meta["error"]) == ("layers", "gradients")
    layers = find_layers(model)
    divergence = lowered_divergence(model, layers, [{**b, "use_cache": False} for b in batches], "int8")
    wanted = shared_out(divergence, gradients.importance["error"])
    np.testing.assert_allclose(whole.importance["error"], wanted, rtol=1e-5)
    np.testing.assert_allclose(whole.importance["error"].sum(1), divergence, rtol=1e-5)
    assert whole.importance["output_error"].tolist() == gradients.importance["output_error"].tolist()
    few = profile(model, batches, ProfileOptions(layer_tokens=5))
    assert few.importance["error"].tolist() != whole.importance["error"].tolist()


def test_a_layer_of_which_nothing_is_seen_keeps_its_estimate():
    error = np.array([[1.0, 4.0, 0.0], [1e-9, 0.0, 3e-9], [0.0, 0.0, 0.0]])
    found = shared_out(np.array([0.6, 0.0, 0.5]), error)
    np.testing.assert_allclose(found, [[0.2, 0.4, 0.0], [1e-9, 0.0, 3e-9], [0.0, 0.0, 0.0]], rtol=1e-6)
