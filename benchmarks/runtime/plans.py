"""Plans made by hand: nothing changed, a quarter in low precision with replicas, all in low precision.

E experts of a layer. They go through `equipoise.apply` as any plan does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import equipoise as eq
from equipoise.formats import FORMATS
from equipoise.models import find_layers
from equipoise.models.families import MoELayer
from equipoise.runtime import slot_bytes
from equipoise.types import Budget, LayerPlan, ModelIdentity, Plan, Slot

LOW = [name for name in FORMATS if name.startswith("int8")]
"""The int8 formats there are: `int8` computes in int8 where it can; a weight-only one computes in 16 bits."""


def unchanged(num_experts: int) -> list[Slot]:
    """Every expert once, as it is."""
    return [Slot(e) for e in range(num_experts)]


def all_low(num_experts: int, precision: Any = "int8") -> list[Slot]:
    """Every expert once, in low precision."""
    return [Slot(e, precision) for e in range(num_experts)]


def quarter_low(load: Sequence[int], precision: Any = "int8") -> list[Slot]:
    """The E/4 least loaded experts in low precision, which pays for a replica of each of the E/4 busiest.

    The bytes of the original, but for the scales.

    Args:
        load: [E] selections.
        precision: an int8 format.
    """
    order = sorted(range(len(load)), key=lambda e: load[e])
    few = max(1, len(load) // 4)
    low, busy = set(order[:few]), set(order[-few:])
    slots = []
    for e in range(len(load)):
        if e in busy:
            slots += [Slot(e, share=0.5), Slot(e, precision, share=0.5)]
        else:
            slots.append(Slot(e, precision if e in low else "original"))
    return slots


def plan_of_slots(model: torch.nn.Module, slots: Callable[[int, MoELayer], list[Slot]]) -> Plan:
    """A plan with the slots given for each layer (its number in order, the layer); its budget is what they need."""
    layers = find_layers(model)
    plans = tuple(
        LayerPlan(layer.layer_id, layer.name, layer.num_experts, tuple(slots(i, layer)))
        for i, layer in enumerate(layers)
    )
    original = sum(slot_bytes(layer.layout, "original") * layer.num_experts for layer in layers)
    spent = sum(
        slot_bytes(layer.layout, slot.precision)
        for layer, layer_plan in zip(layers, plans, strict=True)
        for slot in layer_plan.slots
    )
    config: Any = model.config
    dtype = str(layers[0].layout.dtype).removeprefix("torch.")
    identity = ModelIdentity(
        "benchmark", config.model_type, len(layers), layers[0].num_experts, config.num_experts_per_tok, dtype
    )
    return Plan(identity, "", "benchmark", 0, Budget(original, max(spent, original), spent), 1, plans)


def twin(model: Any) -> Any:
    """A model of its own on the same weights: its parameters share the storage of `model`'s."""
    with torch.device("meta"):
        other = type(model)(model.config.__class__.from_dict(model.config.to_dict()))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        owner, _, leaf = name.rpartition(".")
        part = other.get_submodule(owner)
        if isinstance(tensor, torch.nn.Parameter):
            part.register_parameter(leaf, torch.nn.Parameter(tensor.detach(), requires_grad=False))
        else:
            part.register_buffer(leaf, tensor, persistent=leaf not in part._non_persistent_buffers_set)
    other.tie_weights()
    return other.eval()


def balanced(model: Any, plan: Plan) -> Any:
    """A twin of `model` with the plan applied; the model itself stays as it is."""
    return eq.apply(twin(model), plan)
