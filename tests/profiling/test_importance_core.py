"""Importance against brute force: Algorithm 2 in plain numpy, and the output error one token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from core_models import batch
from equipoise.formats import get_format
from equipoise.models import find_layers
from equipoise.options import ProfileOptions
from equipoise.planning import plan
from equipoise.profiling import profile
from tiny import EXPERTS, FAMILIES

CASES = [
    ("mixtral", torch.float32),
    ("gpt_oss", torch.float32),
    ("nemotron_h", torch.float32),
    ("qwen2_moe", torch.bfloat16),
    ("switch_transformers", torch.float32),
]


def inputs_of(model: Any, seed: int) -> dict[str, torch.Tensor]:
    inputs = batch(rows=3, length=14, seed=seed)
    if model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": inputs["input_ids"].flip(1), "decoder_attention_mask": torch.ones(3, 14).long()}
    return inputs


class Recorder:
    """What each experts module was given, real rows only, read apart from `watch`: hidden, index, weights."""

    def __init__(self, model: Any, batches: list[dict[str, torch.Tensor]]) -> None:
        self.rows: dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
        layers = find_layers(model)
        handles = [
            layer.experts.register_forward_pre_hook(
                lambda module, args, name=layer.name: self.rows.setdefault(name, []).append(args)
            )
            for layer in layers
        ]
        with torch.no_grad():
            for inputs in batches:
                model(**inputs)
        for handle in handles:
            handle.remove()
        self.layers = layers
        for layer in layers:
            kept = []
            for inputs, (hidden, index, weights) in zip(batches, self.rows[layer.name], strict=True):
                key = "decoder_attention_mask" if layer.name.startswith("decoder") else "attention_mask"
                real = inputs[key].reshape(-1).bool()
                if index.shape[-1] == EXPERTS and index.ndim == 3:  # Switch: one-hot, zero where dropped
                    one_hot = index.reshape(-1, EXPERTS)
                    index = torch.where(one_hot.sum(-1) > 0, one_hot.argmax(-1), EXPERTS)[:, None]
                    hidden, weights = hidden.reshape(-1, hidden.shape[-1]), weights.reshape(-1, 1)
                hidden = hidden.reshape(-1, hidden.shape[-1])
                kept.append((hidden[real], index[real], weights[real]))
            self.rows[layer.name] = kept

    def selections(self, layer: Any) -> list[tuple[torch.Tensor, int, float, int]]:
        """(hidden of the token, expert, weight, number of the token) of each selection."""
        out = []
        number = 0
        for hidden, index, weights in self.rows[layer.name]:
            for t in range(len(hidden)):
                for j in range(index.shape[1]):
                    if int(index[t, j]) < EXPERTS:
                        out.append((hidden[t], int(index[t, j]), float(weights[t, j]), number))
                number += 1
        return out


def run_expert(layer: Any, x: torch.Tensor, e: int, precision: str) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    def linear(name: str, rows: torch.Tensor) -> torch.Tensor:
        weight, form = layer.layout.weight(name), get_format(precision)
        y = form.linear(rows, form.encode(layer.layout.expert(name, e).detach(), weight.out_axis), weight.out_axis)
        return y if weight.bias is None else y + layer.layout.expert(weight.bias, e).detach()

    with torch.no_grad():
        y, inner = layer.layout.compute(x[None], linear)
    return y[0].double().numpy(), {name: v[0] for name, v in inner.items()}


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_error_is_the_output_error_of_one_expert_alone(family: str, dtype: torch.dtype):
    model = FAMILIES[family](dtype=dtype)
    batches = [inputs_of(model, 0), inputs_of(model, 1)]
    found = profile(model, batches)
    low = "int8" if dtype == torch.bfloat16 else "float16"
    assert found.meta["low_precision"] == low
    recorder = Recorder(model, batches)
    for row, layer in enumerate(recorder.layers):
        selections = recorder.selections(layer)
        error = np.zeros(EXPERTS)
        tokens: dict[int, np.ndarray] = {}
        for x, e, w, number in selections:
            y, _ = run_expert(layer, x, e, "original")
            y_low, _ = run_expert(layer, x, e, low)
            error[e] += w**2 * float(((y - y_low) ** 2).sum())
            tokens[number] = tokens.get(number, 0) + w * y
        energy = sum(float((y**2).sum()) for y in tokens.values())
        wanted = error / energy
        assert wanted.max() > 0
        tolerance = 0.1 if dtype == torch.bfloat16 else 2e-3  # rows are rounded otherwise when computed in one batch
        np.testing.assert_allclose(
            found.importance["output_error"][row], wanted, rtol=tolerance, atol=wanted.max() * 1e-3
        )
        assert (found.importance["output_error"][row][found.counts[row] == 0] == 0).all()


def matrices(family: str, name: str, weight: np.ndarray) -> list[np.ndarray]:
    """The weight matrices of the paper's experts, each [out, in]: fused ones taken apart, as each family fuses them."""
    if family == "gpt_oss":  # [in, out], gate and up interleaved
        weight = weight.T
        return [weight[0::2], weight[1::2]] if name == "gate_up_proj" else [weight]
    if name == "gate_up_proj":
        return [weight[: len(weight) // 2], weight[len(weight) // 2 :]]
    return [weight]


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_wanda_is_algorithm_2(family: str, dtype: torch.dtype):
    """S = |W| * ||X||_2; sort; mean of the lowest half of each matrix; mean over the expert's matrices."""
    model = FAMILIES[family](dtype=dtype)
    batches = [inputs_of(model, 0), inputs_of(model, 1)]
    found = profile(model, batches)
    recorder = Recorder(model, batches)
    for row, layer in enumerate(recorder.layers):
        inputs: dict[tuple[int, str], list[np.ndarray]] = {}
        for x, e, _, _ in recorder.selections(layer):
            _, inner = run_expert(layer, x, e, "original")
            for name, values in inner.items():
                inputs.setdefault((e, name), []).append(values.double().numpy())
        wanted = np.zeros(EXPERTS)
        for e in range(EXPERTS):
            means = []
            for weight in layer.layout.weights:
                if not weight.quantizable or (e, weight.name) not in inputs:
                    continue
                norm = np.sqrt((np.stack(inputs[e, weight.name]) ** 2).sum(0))
                for matrix in matrices(
                    family, weight.name, layer.layout.expert(weight.name, e).double().detach().numpy()
                ):
                    scores = np.sort((np.abs(matrix) * norm[None, :]).reshape(-1))
                    means.append(scores[: len(scores) // 2].mean())
            wanted[e] = np.mean(means) if means else 0
        assert len(set(wanted)) > 3
        tolerance = 0.02 if dtype == torch.bfloat16 else 1e-4
        np.testing.assert_allclose(found.importance["wanda"][row], wanted, rtol=tolerance)


def test_importance_of_a_part_of_the_batches():
    """Sequences of about `importance_tokens` tokens, spread over the data; the load is counted on all of it."""
    from equipoise.options import ProfileOptions

    model = FAMILIES["mixtral"]()
    batches = [batch(rows=2, length=10, seed=i) for i in range(10)]
    found = profile(model, batches, ProfileOptions(importance_tokens=30))
    pairs = [[(1, 0), (3, 1)], [(6, 0), (8, 1)]]
    keys = batches[0].keys()
    alone = profile(model, [{k: torch.stack([batches[i][k][row] for i, row in pair]) for k in keys} for pair in pairs])
    for name in ("error", "wanda"):
        np.testing.assert_allclose(found.importance[name], alone.importance[name], rtol=1e-4)
    assert found.meta["importance_tokens"] == alone.meta["tokens"] == 2 * (10 + 5)
    assert found.meta["tokens"] == 10 * 15
    assert found.counts.sum(1).tolist() == [2 * 150] * 3
    assert not profile(model, batches, ProfileOptions(importance_tokens=0)).importance


def test_error_can_be_measured_for_another_precision():
    """bfloat16 weights are exact in float16, so of a float32 copy the usual error says nothing of int8."""
    model = FAMILIES["mixtral"](dtype=torch.bfloat16).float()
    batches = [inputs_of(model, 0)]
    usual, asked = profile(model, batches), profile(model, batches, ProfileOptions(low_precision="int8"))
    assert asked.meta["low_precision"] == "int8"
    assert float(usual.importance["output_error"].max()) < 1e-6
    reached = asked.counts > 0
    assert (asked.importance["output_error"][reached] > 1e-7).all()
    made = plan(asked, replicas=1)
    assert {slot.precision for layer in made.layers for slot in layer.slots} == {"original", "int8"}
