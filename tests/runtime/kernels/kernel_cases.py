"""Balanced layers and batches that the tests of the kernels share."""

from __future__ import annotations

from typing import Any

import torch

from core_models import PACKABLE, random_slots
from equipoise.models import MoELayer
from equipoise.runtime import apply
from families.families_support import make_plan
from tiny import EXPERTS, FAMILIES

KINDS = ["mixtral", "gpt_oss", "nemotron_h", "qwen2_moe"]


def balanced(family: str, precisions: tuple[str, ...] = PACKABLE, dtype: torch.dtype = torch.bfloat16) -> Any:
    model = FAMILIES[family](dtype=dtype)
    return apply(model, make_plan(model, lambda row: random_slots(row, precisions)))


def width(layer: MoELayer) -> int:
    weight = layer.layout.weights[0]
    return weight.shape[-2] if weight.out_axis == -1 else weight.shape[-1]


def batch(layer: MoELayer, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width(layer), generator=draw).to(layer.layout.dtype)
    return hidden, torch.randint(0, EXPERTS + 1, (tokens, 2), generator=draw), torch.rand(tokens, 2, generator=draw)
