"""Importance written out a second time, family by family, from the formulas: R&Q Algorithm 2 and the output error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from families_support import batch_of, padded, reading_routers, shared_model

from equipoise.models import find_layers
from equipoise.options import ProfileOptions
from equipoise.profiling import profile
from tiny import EXPERTS

Tensors = dict[str, torch.Tensor]
IDS, MASK = padded([9, 14, 5], "right", seed=33)


@dataclass(frozen=True)
class Formula:
    """One expert of a family: its weights [out, in] (and biases [out]), and its function.

    Attributes:
        matrices: experts module, expert -> name -> [out, in] or [out].
        inner: weights, x [T, H] -> input of the last matrix [T, I].
        last: name of the last matrix.
    """

    matrices: Callable[[Any, int], Tensors]
    inner: Callable[[Tensors, torch.Tensor], torch.Tensor]
    last: str = "down"

    def __call__(self, w: Tensors, x: torch.Tensor) -> torch.Tensor:
        return self.inner(w, x) @ w[self.last].T + w.get(f"{self.last}_b", 0)


def _halves(m: Any, e: int) -> Tensors:
    size = m.gate_up_proj.shape[1] // 2
    return {"gate": m.gate_up_proj[e, :size], "up": m.gate_up_proj[e, size:], "down": m.down_proj[e]}


def _transposed_halves(m: Any, e: int) -> Tensors:
    size = m.gate_up_proj.shape[2] // 2
    return {"gate": m.gate_up_proj[e, :, :size].T, "up": m.gate_up_proj[e, :, size:].T, "down": m.down_proj[e].T}


def _interleaved(m: Any, e: int) -> Tensors:
    pairs, bias = m.gate_up_proj[e], m.gate_up_proj_bias[e]
    return {
        "gate": pairs[:, 0::2].T,
        "up": pairs[:, 1::2].T,
        "down": m.down_proj[e].T,
        "gate_b": bias[0::2],
        "up_b": bias[1::2],
        "down_b": m.down_proj_bias[e],
    }


def _silu_gate(w: Tensors, x: torch.Tensor) -> torch.Tensor:
    gate = x @ w["gate"].T
    return gate * torch.sigmoid(gate) * (x @ w["up"].T)


def _clamped_gate(w: Tensors, x: torch.Tensor) -> torch.Tensor:
    gate = (x @ w["gate"].T + w["gate_b"]).clamp(max=7)
    up = (x @ w["up"].T + w["up_b"]).clamp(-7, 7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


FORMULAS = {
    "mixtral": Formula(_halves, _silu_gate),
    "deepseek_v3": Formula(_halves, _silu_gate),
    "aria": Formula(_transposed_halves, _silu_gate),
    "gpt_oss": Formula(_interleaved, _clamped_gate),
    "nemotron_h": Formula(
        lambda m, e: {"up": m.up_proj[e], "down": m.down_proj[e]}, lambda w, x: (x @ w["up"].T).relu().square()
    ),
    "switch_transformers": Formula(
        lambda m, e: {"up": m[f"expert_{e}"].wi.weight, "down": m[f"expert_{e}"].wo.weight},
        lambda w, x: (x @ w["up"].T).relu(),
    ),
}


def lowest_half(matrix: torch.Tensor, x: torch.Tensor) -> float:
    """Mean of the lowest half of |W| * ||X||."""
    scores = np.sort((matrix.abs() * x.square().sum(0).sqrt()).numpy().ravel())
    return float(scores[: len(scores) // 2].mean())


@pytest.mark.parametrize("name", FORMULAS)
@torch.no_grad()
def test_importance_from_the_formulas(name: str):
    model, formula = shared_model(name), FORMULAS[name]
    layers = find_layers(model)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    hooks = [
        layer.experts.register_forward_pre_hook(
            lambda _, args, row=row: seen.__setitem__(row, (args[0].reshape(-1, args[0].shape[-1]), args[2].flatten(1)))
        )
        for row, layer in enumerate(layers)
    ]
    with reading_routers(model) as log:
        result = profile(model, [batch_of(model, IDS, MASK)], ProfileOptions(importance_tokens=1000))
    for hook in hooks:
        hook.remove()

    real = MASK.flatten().bool()
    for row, layer in enumerate(layers):
        hidden, weights = seen[row]
        index = log.calls[row][0].masked_fill(~real[:, None], EXPERTS)
        total = torch.zeros_like(hidden)
        wanda, error = np.zeros(EXPERTS), np.zeros(EXPERTS)
        for e in range(EXPERTS):
            tokens, place = torch.where(index == e)
            if not len(tokens):
                continue
            w = formula.matrices(layer.experts, e)
            x, share = hidden[tokens], weights[tokens, place, None]
            scores = [
                lowest_half(matrix, formula.inner(w, x) if key == formula.last else x)
                for key, matrix in w.items()
                if not key.endswith("_b")
            ]
            wanda[e] = np.mean(scores)
            low = {key: value if key.endswith("_b") else value.half().float() for key, value in w.items()}
            y = formula(w, x)
            error[e] = (share * (y - formula(low, x))).square().sum()
            total[tokens] += share * y
        np.testing.assert_allclose(result.importance["wanda"][row], wanda, rtol=1e-4)
        # Rounding errors of float16 are small differences of large numbers.
        wanted = error / float(total.square().sum())
        np.testing.assert_allclose(result.importance["output_error"][row], wanted, rtol=1e-2)
