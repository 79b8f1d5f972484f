"""`apply`: what it refuses leaves the model as it was; what it does is what the plan says, to the byte."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from core_models import batch, random_slots
from equipoise.errors import InputError
from equipoise.models import find_layers
from equipoise.planning import plan as make_real_plan
from equipoise.profiling import profile
from equipoise.runtime import apply, expert_bytes, plan_of, slot_bytes
from equipoise.types import Budget, LayerPlan, Plan, Slot
from families.families_support import identity_slots, make_plan, replica_slots
from tiny import EXPERTS, FAMILIES


def low_slots(row: int) -> list[Slot]:
    return [Slot(e, "int8") for e in range(EXPERTS)]


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def refused(model: Any, plan: Plan, message: str) -> None:
    """`apply` refuses, and the model is as it was."""
    before, logits = state(model), model(**batch()).logits
    with pytest.raises(InputError) as caught:
        apply(model, plan)
    assert message in str(caught.value)
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model(**batch()).logits, logits)


def changed(plan: Plan, **model: Any) -> Plan:
    return dataclasses.replace(plan, model=dataclasses.replace(plan.model, **model))


def layer_changed(plan: Plan, **values: Any) -> Plan:
    return dataclasses.replace(plan, layers=(dataclasses.replace(plan.layers[0], **values), *plan.layers[1:]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p: changed(p, model_type="olmoe"), "made for a model with model_type 'olmoe', this one has 'mixtral'"),
        (lambda p: changed(p, dtype="bfloat16"), "made for a model with dtype 'bfloat16', this one has 'float32'"),
        (lambda p: changed(p, num_layers=4), "3 layers, but the model has 4"),
        (lambda p: changed(dataclasses.replace(p, layers=p.layers[:2]), num_layers=2), "num_layers 2"),
        (lambda p: layer_changed(p, layer=7), "the plan names layer 7"),
        (lambda p: layer_changed(p, name=""), "the plan names layer 0 ''"),
        (lambda p: layer_changed(p, slots=p.layers[0].slots[1:]), "expert 0 has no slot"),
        (lambda p: dataclasses.replace(p, budget=Budget(1, 0, 1)), "over budget"),
        (lambda p: dataclasses.replace(p, budget=Budget(9, 9, 9)), "over budget; make it again"),
        (lambda p: layer_changed(p, slots=tuple(Slot(e) for e in range(EXPERTS))), "the plan states"),
    ],
)
@torch.no_grad()
def test_plans_that_do_not_fit(edit: Callable[[Plan], Plan], message: str):
    model = FAMILIES["mixtral"]()
    refused(model, edit(make_plan(model, replica_slots)), message)


@torch.no_grad()
def test_plan_for_other_experts():
    model = FAMILIES["mixtral"]()
    plan = make_plan(model, identity_slots)
    layers = tuple(LayerPlan(p.layer, p.name, 4, tuple(Slot(e) for e in range(4))) for p in plan.layers)
    refused(model, changed(dataclasses.replace(plan, layers=layers), num_experts=4), "num_experts 4")


@torch.no_grad()
def test_second_plan():
    model = FAMILIES["mixtral"]()
    for slots in (replica_slots, identity_slots):
        model = FAMILIES["mixtral"]()
        first = make_plan(model, slots)
        apply(model, first)
        assert plan_of(model) == first
        refused(model, first, "has a plan already")
        assert plan_of(model) == first


@pytest.mark.parametrize("value", [1e6, float("nan")])
@torch.no_grad()
def test_a_weight_that_does_not_fit_leaves_the_model_alone(value: float):
    """In the last layer: the layers before it must not have been changed when it is found."""
    model = FAMILIES["mixtral"]()
    find_layers(model)[-1].experts.down_proj[EXPERTS - 1, 0, 0] = value
    plan = make_plan(model, lambda row: [Slot(e, "float16") for e in range(EXPERTS)])
    with pytest.raises(InputError, match=r"layer 2, expert 7, down_proj: a weight"):
        apply(model, plan)
    assert not any(hasattr(layer.experts, "equipoise_slots") for layer in find_layers(model))
    assert plan_of(model) is None


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "switch_transformers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_tensors(family: str, dtype: torch.dtype):
    model = FAMILIES[family](dtype=dtype)
    layers = find_layers(model)
    before = expert_bytes(model)
    for layer in layers:
        tensors = [p for n, p in layer.experts.named_parameters() if layer.layout.is_expert_weight(n)]
        assert before[layer.name] == {"original": sum(p.numel() * p.element_size() for p in tensors)}
        assert sum(before[layer.name].values()) == EXPERTS * slot_bytes(layer.layout, "original")
    plan = make_plan(model, random_slots)
    apply(model, plan)
    after = expert_bytes(model)
    for layer, layer_plan in zip(find_layers(model), plan.layers, strict=True):
        tensors = [p for n, p in layer.experts.named_parameters() if layer.layout.is_expert_weight(n)]
        assert sum(after[layer.name].values()) == sum(p.numel() * p.element_size() for p in tensors)
        assert sum(after[layer.name].values()) == sum(slot_bytes(layer.layout, s.precision) for s in layer_plan.slots)
        assert set(after[layer.name]) - {"original"} <= {slot.precision for slot in layer_plan.slots}
    assert sum(sum(sizes.values()) for sizes in after.values()) == plan.budget.plan_bytes


def test_int8_bytes_by_hand():
    """Mixtral, hidden 32, intermediate 16: gate_up [32, 32] and down [32, 16] of an expert."""
    (layer, *_) = find_layers(FAMILIES["mixtral"]())
    values = 32 * 32 + 32 * 16
    assert slot_bytes(layer.layout, "original") == 4 * values
    assert slot_bytes(layer.layout, "float16") == 2 * values
    assert slot_bytes(layer.layout, "int8") == values + 4 * (32 + 32)


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
@torch.no_grad()
def test_a_real_plan_from_a_real_profile(family: str):
    """Profile, plan, apply: bytes as planned, replicas and low slots as planned, and still the same model, nearly."""
    model, untouched = FAMILIES[family](dtype=torch.bfloat16), FAMILIES[family](dtype=torch.bfloat16)
    inputs = batch(8, 32)
    if family == "switch_transformers":
        inputs |= {"decoder_input_ids": inputs["input_ids"]}
    measured = profile(model, [inputs])
    plan = make_real_plan(measured, budget=1.0)
    assert plan.num_replicas > 0
    assert plan.num_quantized > 0
    before = sum(sum(sizes.values()) for sizes in expert_bytes(model).values())
    assert apply(model, plan) is model
    after = expert_bytes(model)
    assert sum(sum(sizes.values()) for sizes in after.values()) == plan.budget.plan_bytes <= before
    assert sum(sizes.get("int8", 0) for sizes in after.values()) > 0
    change = (model(**inputs).logits - untouched(**inputs).logits).float()
    assert 0 < change.norm() < 0.2 * untouched(**inputs).logits.float().norm()


@torch.no_grad()
def test_plan_in_which_every_expert_is_low():
    model = FAMILIES["qwen3_moe"]()
    apply(model, make_plan(model, low_slots))
    for layer in find_layers(model):
        assert {p.dtype for p in layer.experts.parameters()} == {torch.int8, torch.float32}
    assert torch.isfinite(model(**batch()).logits).all()
