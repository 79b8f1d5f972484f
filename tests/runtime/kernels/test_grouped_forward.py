"""The GPU path: its arithmetic on the CPU, where torch has the same products, and on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from core_models import ANY, random_slots
from equipoise.errors import InputError
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
    k = 1 if type(layer.layout).__name__ == "SwitchLayout" else 2
    for tokens in (0, 1, 50, 200):
        draw = torch.Generator().manual_seed(tokens)
        hidden = torch.randn(tokens, width, generator=draw).bfloat16()
        index = torch.randint(0, EXPERTS + 1, (tokens, k), generator=draw)
        yield hidden.to(device), index.to(device), torch.rand(tokens, k, generator=draw).to(device)


FOUND = ["mixtral", "gpt_oss", "nemotron_h", "muse_spark", "aria", "switch_transformers"]
"""One of each layout: gate and up in one or interleaved, either axis first, biases, no gate, a norm after, modules."""

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def check(layer: Any, case: tuple[torch.Tensor, ...], forward: Any) -> None:
    """`forward` against plain operations, with memory full of NaN where nothing is computed."""
    slots = layer.experts.equipoise_slots
    got, wanted = forward(slots, *case), plain_forward(slots, *case)
    assert got.dtype == torch.bfloat16
    assert got.device == case[0].device
    assert got.isfinite().all()
    assert (got - wanted).float().norm() <= 0.02 * wanted.float().norm()


@pytest.mark.parametrize("family", FOUND)
@torch.no_grad()
def test_on_the_cpu_it_computes_what_the_formats_say(family: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(grouped.VARIABLE, "torch")
    for layer in layers_of(family, "cpu"):
        for case in cases(layer, "cpu"):
            check(layer, case, grouped.forward)


@torch.no_grad()
def test_what_nothing_was_written_to_never_shows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(grouped.VARIABLE, "torch")
    own, layer = torch._grouped_mm, layers_of("mixtral", "cpu")[0]

    def with_rubbish(x: torch.Tensor, stack: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        y = own(x, stack, offs=offs)
        y[int(offs[-1]) :] = torch.nan
        return y

    monkeypatch.setattr(torch, "_grouped_mm", with_rubbish)
    monkeypatch.setattr(torch, "empty", lambda size, **kind: torch.full(size, torch.nan, **kind))
    case = list(cases(layer, "cpu"))[-1]
    assert (case[1] == EXPERTS).any()
    check(layer, case, grouped.forward)


def test_original_slots_are_the_first_pool():
    table = layers_of("mixtral", "cpu")[0].experts.equipoise_slots.table
    assert next(iter(table.pools)) == "original"
    assert table.in_order(torch.device("cpu"))[:-1].tolist() == [s for pool in table.pools.values() for s in pool]


def test_it_is_for_gpus():
    layer = layers_of("mixtral", "cpu")[0]
    assert not grouped.is_ready(layer.experts.equipoise_slots, torch.zeros(1, 32, dtype=torch.bfloat16))


def test_an_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(grouped.VARIABLE, "fast")
    with pytest.raises(InputError, match="EQUIPOISE_CUDA_KERNELS is 'fast': it must be one of triton"):
        grouped.choice(torch.device("cpu"))


@gpu
@needs_gpu
@pytest.mark.parametrize("kernels", grouped.CHOICES)
@pytest.mark.parametrize("family", FOUND)
@torch.no_grad()
def test_on_a_gpu(family: str, kernels: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(grouped.VARIABLE, kernels)
    assert grouped.choice(torch.device("cuda", 0))[0] == kernels
    for layer in layers_of(family, "cuda")[:1]:
        for case in cases(layer, "cuda"):
            assert grouped.is_ready(layer.experts.equipoise_slots, case[0])
            check(layer, case, slots_forward)


@gpu
@needs_gpu
@torch.no_grad()
def test_the_host_never_waits_and_a_graph_can_hold_it():
    for family in ("mixtral", "gpt_oss"):
        layer = layers_of(family, "cuda")[0]
        slots = layer.experts.equipoise_slots
        for case in [case for case in cases(layer, "cuda") if len(case[0])]:
            wanted = slots_forward(slots, *case)
            torch.cuda.set_sync_debug_mode("error")
            try:
                assert slots_forward(slots, *case).shape == wanted.shape
            finally:
                torch.cuda.set_sync_debug_mode("default")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = slots_forward(slots, *case)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, wanted)
