"""Whole models on a GPU; the same on the CPU, so that what the tests ask is known to hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import equipoise as eq
from core_models import batch
from equipoise.models import find_layers
from equipoise.rerouting import Rule, Thresholds, installed
from equipoise.runtime.kernels import grouped
from equipoise.types import Slot
from families.families_support import make_plan
from runtime.balancer_cases import FREE, SPARE, spare_slots
from tiny import EXPERTS, FAMILIES, save_tiny

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
everywhere = pytest.mark.parametrize("device", ["cpu", GPU])


def on(device: str, seed: int = 0) -> dict[str, torch.Tensor]:
    return {key: value.to(device) for key, value in batch(seed=seed).items()}


def model_on(device: str, family: str = "mixtral") -> Any:
    return FAMILIES[family](dtype=torch.bfloat16).to(device)


def mixed(row: int) -> list[Slot]:
    """An int8 expert, an int8 replica, the rest as they are."""
    return [Slot(0, "int8"), Slot(1, share=0.5), Slot(1, "int8", share=0.5), *(Slot(e) for e in range(2, EXPERTS))]


def near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Nine tokens of ten within 5 %: where two experts score alike, a rounding error chooses the other."""
    assert got.isfinite().all()
    apart = (got.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1)
    assert (apart <= 0.05).float().mean() >= 0.9


@everywhere
@torch.no_grad()
def test_profile_plan_apply_save_and_load(device: str, tmp_path: Path):
    model = model_on(device)
    found = eq.profile(model, [batch(seed=seed) for seed in range(3)])
    assert found.counts.sum() > 0
    assert np.isfinite(found.importance["error"]).all()
    eq.apply(model, eq.plan(found, budget=1.0))
    wanted = model(**on(device)).logits
    save_tiny(model, tmp_path / "balanced")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "balanced").to(device).eval()
    near(again(**on(device)).logits, wanted)
    assert {p.device.type for p in again.parameters()} == {device}
    if device == "cuda":
        direct = AutoModelForCausalLM.from_pretrained(tmp_path / "balanced", device_map={"": 0}).eval()
        assert torch.equal(direct(**on(device)).logits, wanted)


@everywhere
@torch.no_grad()
def test_a_model_balanced_on_the_cpu_moves(device: str):
    plain = model_on("cpu")
    wanted = eq.apply(plain, make_plan(plain, mixed))(**on("cpu")).logits
    model = plain.to(device)
    layer = find_layers(model)[0]
    hidden = torch.zeros(1, 32, dtype=torch.bfloat16, device=device)
    assert grouped.is_ready(layer.experts.equipoise_slots, hidden) == (device == "cuda")
    near(model(**on(device)).logits.cpu(), wanted)


@everywhere
@torch.no_grad()
def test_watching_counts_what_was_selected(device: str):
    model = model_on(device)
    eq.apply(model, make_plan(model, mixed))
    with eq.watch(model) as load:
        model(**on(device))
    tokens = int(batch()["attention_mask"].sum())
    assert load.counts.sum(1).tolist() == [2 * tokens] * len(load.counts)
    for counts, slots in zip(load.counts, load.slot_counts, strict=True):
        assert slots.sum() == counts.sum()
        assert slots[1] + slots[2] == counts[1]


@everywhere
@pytest.mark.parametrize("precision", ["original", "int8"])
@torch.no_grad()
def test_replicas_move(device: str, precision: str):
    model = model_on(device)
    eq.apply(model, make_plan(model, lambda row: spare_slots(row, precision)))
    before = model(**on(device)).logits
    with eq.StreamingBalancer(model, options=FREE, window=10_000) as balancer:
        for live in balancer._live.values():
            live.move(live.spare[0], 6, 10.0)
        slots = balancer.slots
        assert (slots[:, 6] == 2).all()
        assert (slots[:, 0] == 1).all()
        for live in balancer._live.values():
            got, wanted = (
                live.original.weight("down_proj", slot, torch.float32) for slot in (live.spare[0], live.primary[6])
            )
            assert (got - wanted).abs().max() <= wanted.abs().max() / 100
        near(model(**on(device)).logits, before)
    assert torch.equal(model(**on(device)).logits, before)


@everywhere
@torch.no_grad()
def test_windows_close_and_decide(device: str):
    model = model_on(device)
    eq.apply(model, make_plan(model, spare_slots))
    with eq.StreamingBalancer(model, window=32, options=FREE) as balancer:
        for seed in range(3):
            model(**on(device, seed))
        assert balancer.steps > 0
        assert not balancer.failures
        assert balancer.slots.sum() == len(balancer.slots) * (EXPERTS + SPARE)


@everywhere
@torch.no_grad()
def test_laser(device: str):
    model = model_on(device)
    wanted = model(**on(device)).logits
    with installed(model, Thresholds.of(model, Rule())) as routing:
        assert torch.equal(model(**on(device)).logits, wanted)
        assert not routing.rerouted.any()
    with installed(model, Thresholds.of(model, Rule(gap=0.5))) as routing:
        assert model(**on(device)).logits.isfinite().all()
        assert routing.rerouted.any()
        assert (routing.tokens == int(batch()["attention_mask"].sum())).all()
    assert torch.equal(model(**on(device)).logits, wanted)
