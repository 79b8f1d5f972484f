"""The GPU path: its arithmetic on the CPU, where torch has the same products, and on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from core_models import ANY, random_slots
from equipoise.models import find_layers
from equipoise.runtime.experts import plain_forward, slots_forward
from equipoise.runtime.install import fill_layer
from equipoise.runtime.kernels import grouped
from families.families_support import make_plan
from tiny import EXPERTS, FAMILIES


def layers_of(family: str, device: str) -> Any:
    """Layers with plain slots of every precision on a device."""
    model = FAMILIES[family](dtype=torch.bfloat16)
    plan = make_plan(model, lambda row: random_slots(row, ANY))
    layers = find_layers(model)
    for layer, layer_plan in zip(layers, plan.layers, strict=True):
        fill_layer(layer, layer_plan)
    model.to(device)
    return layers


def cases(layer: Any, device: str) -> Any:
    weight = layer.layout.weights[0]
    width = weight.shape[-2] if weight.out_axis == -1 else weight.shape[-1]
    for tokens in (0, 1, 50):
        draw = torch.Generator().manual_seed(tokens)
        hidden = torch.randn(tokens, width, generator=draw).bfloat16()
        index = torch.randint(0, EXPERTS + 1, (tokens, 2), generator=draw)
        yield hidden.to(device), index.to(device), torch.rand(tokens, 2, generator=draw).to(device)


FOUND = ["mixtral", "gpt_oss", "nemotron_h"]


@pytest.mark.parametrize("family", FOUND)
@torch.no_grad()
def test_on_the_cpu_it_computes_what_the_formats_say(family: str):
    for layer in layers_of(family, "cpu"):
        slots = layer.experts.equipoise_slots
        for case in cases(layer, "cpu"):
            got, wanted = grouped.forward(slots, *case), plain_forward(slots, *case)
            assert got.dtype == torch.bfloat16
            assert (got - wanted).float().norm() <= 0.01 * wanted.float().norm()


def test_it_is_for_gpus():
    layer = layers_of("mixtral", "cpu")[0]
    assert not grouped.is_ready(layer.experts.equipoise_slots, torch.zeros(1, 32, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("family", FOUND)
@torch.no_grad()
def test_on_a_gpu(family: str):
    for layer in layers_of(family, "cuda"):
        slots = layer.experts.equipoise_slots
        for case in cases(layer, "cuda"):
            assert grouped.is_ready(slots, case[0])
            got, wanted = slots_forward(slots, *case), plain_forward(slots, *case)
            assert (got - wanted).float().norm() <= 0.02 * wanted.float().norm()
