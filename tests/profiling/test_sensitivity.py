"""`error` against brute force: autograd by each layer's output, one token and one expert at a time."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from equipoise.errors import InputError
from equipoise.models import find_layers
from equipoise.options import ProfileOptions
from equipoise.profiling import profile, sensitivity
from profiling.test_importance_core import Recorder, inputs_of, run_expert
from tiny import EXPERTS, FAMILIES

GRADIENTS = ProfileOptions(layer_tokens=0)
CASES = ["mixtral", "gpt_oss", "deepseek_v3", "qwen2_moe", "switch_transformers"]


def slopes(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[dict[str, list[torch.Tensor]], int]:
    """|g|^2 / H of each token by layer, a tensor a batch, and tokens drawn; gradients from the embeddings."""
    found: dict[str, list[torch.Tensor]] = {}
    count = 0
    layers = find_layers(model)
    for inputs in batches:
        outputs: dict[str, torch.Tensor] = {}
        handles = [
            layer.experts.register_forward_hook(
                lambda _, args, out, name=layer.name, seen=outputs: seen.__setitem__(name, out)
            )
            for layer in layers
        ]
        handles += [
            module.register_forward_hook(lambda _, args, out: out.requires_grad_())
            for module in model.modules()
            if isinstance(module, nn.Embedding)
        ]
        logits = model(**inputs, use_cache=False).logits
        for handle in handles:
            handle.remove()
        key = "decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask"
        kept = logits[inputs[key].bool()]
        text = inputs["decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"]
        drawn = torch.Generator().manual_seed(zlib.crc32(text[inputs[key].bool()].numpy().tobytes()))
        below = kept.detach().float().softmax(-1).cumsum(-1)
        level = torch.rand(len(kept), 1, generator=drawn) * below[:, -1:]
        following = (below <= level).sum(-1, keepdim=True)
        score = kept.float().log_softmax(-1).gather(1, following).sum()
        grads = torch.autograd.grad(score, [outputs[layer.name] for layer in layers])
        for layer, grad in zip(layers, grads, strict=True):
            mask = inputs["decoder_attention_mask" if layer.name.startswith("decoder") else "attention_mask"]
            rows = grad.reshape(mask.numel(), -1)[mask.flatten().bool()]
            found.setdefault(layer.name, []).append(rows.double().square().mean(-1))
        count += len(kept)
    return found, count


@pytest.mark.parametrize("family", CASES)
def test_error_is_weighted_by_the_squared_gradient_of_each_token(family: str):
    model = FAMILIES[family](dtype=torch.float32)
    batches = [inputs_of(model, 0), inputs_of(model, 1)]
    found = profile(model, batches, GRADIENTS)
    assert found.meta["error"] == "gradients"
    weights, count = slopes(model, batches)
    recorder = Recorder(model, batches)
    for row, layer in enumerate(recorder.layers):
        slope = torch.cat(weights[layer.name]).numpy()
        error = np.zeros(EXPERTS)
        for x, e, w, number in recorder.selections(layer):
            y, _ = run_expert(layer, x, e, "original")
            y_low, _ = run_expert(layer, x, e, "float16")
            error[e] += w**2 * float(((y - y_low) ** 2).sum()) * slope[number]
        wanted = error / (2 * count)
        assert wanted.max() > 0
        np.testing.assert_allclose(found.importance["error"][row], wanted, rtol=5e-3, atol=wanted.max() * 1e-3)


def state(model: Any) -> tuple[Any, ...]:
    return (
        [p.requires_grad for p in model.parameters()],
        [p.grad is None for p in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        model.training,
        model.config._experts_implementation,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_backwards_and_is_left_as_it_was(family: str):
    model = FAMILIES[family](dtype=torch.float32)
    before = state(model)
    found = profile(model, [inputs_of(model, 0)])
    error = found.importance["error"]
    assert np.isfinite(error).all()
    assert ((error > 0) <= (found.counts > 0)).all()
    reached = found.counts.sum(1) > 0  # experts for images see no text
    assert (error[reached].max(1) > 0).all()
    assert state(model) == before


def test_the_same_profile_again_and_padding_does_not_count():
    model = FAMILIES["mixtral"](dtype=torch.float32)
    inputs = inputs_of(model, 0)
    first, again = (profile(model, [inputs], GRADIENTS).importance["error"] for _ in range(2))
    assert first.tolist() == again.tolist()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    pad = torch.full((len(ids), 5), 3)
    wider = {"input_ids": torch.cat([ids, pad], 1), "attention_mask": torch.cat([mask, torch.zeros_like(pad)], 1)}
    np.testing.assert_allclose(profile(model, [wider], GRADIENTS).importance["error"], first, rtol=5e-3)


def test_the_order_of_the_batches_does_not_matter():
    model = FAMILIES["mixtral"](dtype=torch.float32)
    batches = [inputs_of(model, seed) for seed in range(3)]
    first, turned = (profile(model, order, GRADIENTS).importance["error"] for order in (batches, batches[::-1]))
    np.testing.assert_allclose(turned, first, rtol=1e-5)


def test_large_batches_are_cut_by_sequences(monkeypatch):
    """A batch in pieces is the same as the pieces as batches."""
    model = FAMILIES["mixtral"](dtype=torch.float32)
    inputs = inputs_of(model, 0)
    rows = [{key: value[i : i + 1] for key, value in inputs.items()} for i in range(3)]
    apart = profile(model, rows, GRADIENTS)
    monkeypatch.setattr(sensitivity, "TOKENS", 20)
    monkeypatch.setattr(sensitivity, "ROWS", 64)
    cut = profile(model, [inputs], GRADIENTS)
    assert cut.counts.tolist() == apart.counts.tolist()
    np.testing.assert_allclose(cut.importance["error"], apart.importance["error"], rtol=5e-3)


def test_without_gradients_error_is_that_of_the_output():
    model = FAMILIES["mixtral"](dtype=torch.float32)
    inputs = inputs_of(model, 0)
    plain = profile(model, [inputs], ProfileOptions(sensitivity=False))
    weighed = profile(model, [inputs])
    assert plain.meta["error"] == "output"
    assert sorted(plain.importance) == ["error", "wanda"]
    np.testing.assert_allclose(plain.importance["error"], weighed.importance["output_error"], rtol=1e-4)
    assert plain.counts.tolist() == weighed.counts.tolist()


def test_a_callers_inference_mode_is_no_obstacle():
    model = FAMILIES["mixtral"](dtype=torch.float32)
    with torch.inference_mode():
        inputs = inputs_of(model, 0)
        found = profile(model, [inputs])
    assert found.importance["error"].tolist() == profile(model, [inputs_of(model, 0)]).importance["error"].tolist()
    assert profile(model, [inputs_of(model, 0)]).importance["error"].max() > 0


def test_what_cannot_be_run_backwards_names_the_way_out():
    model = FAMILIES["mixtral"](dtype=torch.float32)
    inputs = inputs_of(model, 0)
    before = state(model)
    handle = model.model.layers[-1].register_forward_hook(
        lambda _, args, out: out.detach() if isinstance(out, torch.Tensor) else (out[0].detach(), *out[1:])
    )
    with pytest.raises(InputError, match="--no-sensitivity"):
        profile(model, [inputs])
    handle.remove()
    assert state(model) == before
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "disk"}
    with pytest.raises(InputError, match=r"offloaded.*--no-sensitivity"):
        profile(model, [inputs])
