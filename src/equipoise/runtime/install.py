"""Putting the slots of a plan in the place of a layer's experts: real weights, or an empty skeleton on the meta device.

A layer whose plan is the identity is left exactly as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from equipoise.errors import InputError
from equipoise.files.plan_json import plan_from_json
from equipoise.formats import get_format
from equipoise.models.families import MoELayer, find_layers, is_dispatched
from equipoise.models.layout import Weight
from equipoise.runtime.experts import IMPLEMENTATION, Slots, experts_forward, stored_name
from equipoise.runtime.sizes import slot_bytes
from equipoise.types import LayerPlan, Plan


def check_fits(plan: Plan, model: PreTrainedModel, layers: list[MoELayer]) -> None:
    """Refuse a plan that was made for another model.

    Raises:
        InputError: naming what differs.
    """
    wanted = plan.model
    found: dict[str, Any] = {
        "model_type": model.config.model_type,
        "num_layers": len(layers),
        "num_experts": layers[0].num_experts,
        "dtype": str(layers[0].layout.dtype).removeprefix("torch."),
    }
    for key, value in found.items():
        if getattr(wanted, key) != value:
            raise InputError(
                f"the plan was made for a model with {key} {getattr(wanted, key)!r}, this one has {value!r}"
            )
    for layer, layer_plan in zip(layers, plan.layers, strict=True):
        if layer.layer_id != layer_plan.layer or layer.name != layer_plan.name:
            raise InputError(
                f"the plan names layer {layer_plan.layer} {layer_plan.name!r} where the model has "
                f"layer {layer.layer_id} {layer.name!r}"
            )
    needed = sum(
        slot_bytes(layer.layout, slot.precision)
        for layer, layer_plan in zip(layers, plan.layers, strict=True)
        for slot in layer_plan.slots
    )
    if needed != plan.budget.plan_bytes:
        over = ", over budget" if needed > plan.budget.limit_bytes else ""
        raise InputError(
            f"the slots need {needed:,} bytes on this model, the plan states {plan.budget.plan_bytes:,}{over}; "
            "make it again with `equipoise plan`"
        )


def check_weights(layer: MoELayer, plan: LayerPlan) -> None:
    """Refuse weights that the precision they are to get cannot hold."""
    for expert, precision in dict.fromkeys((slot.expert, slot.precision) for slot in plan.slots):
        for weight in layer.layout.weights:
            if weight.quantizable:
                try:
                    get_format(precision).check(layer.layout.expert(weight.name, expert).detach())
                except InputError as error:
                    raise InputError(f"layer {layer.layer_id}, expert {expert}, {weight.name}: {error}") from None


def fill_layer(layer: MoELayer, plan: LayerPlan) -> None:
    """Replace a layer's experts by its slots. All new tensors exist before the old ones are dropped."""
    slots = Slots(layer.layout, plan)
    tensors: dict[str, torch.Tensor] = {}
    for weight in layer.layout.weights:
        tensors |= slot_tensors(slots, weight)
    install(layer.experts, slots, tensors)


def slot_tensors(slots: Slots, weight: Weight) -> dict[str, torch.Tensor]:
    """The stored tensors of one weight: each slot's copy of its expert, in its precision.

    Returns:
        name in the checkpoint -> [slots of the precision, ...].
    """
    tensors: dict[str, torch.Tensor] = {}
    for precision, members in _pools(slots, weight).items():
        form = get_format(precision)
        for place, s in enumerate(members):
            source = slots.layout.expert(weight.name, slots.table.layer.slots[s].expert).detach()
            for suffix, part in form.encode(source, weight.out_axis).items():
                name = stored_name(weight.name, precision, suffix)
                if name not in tensors:
                    tensors[name] = part.new_empty((len(members), *part.shape))
                tensors[name][place] = part
    return tensors


def empty_layer(layer: MoELayer, plan: LayerPlan) -> None:
    """Replace the experts of a skeleton on the meta device by empty slots, ready for a checkpoint."""
    slots = Slots(layer.layout, plan)
    install(
        layer.experts,
        slots,
        {
            stored_name(weight.name, precision, part.suffix): torch.empty(
                (len(members), *part.shape), dtype=part.dtype, device="meta"
            )
            for weight in layer.layout.weights
            for precision, members in _pools(slots, weight).items()
            for part in get_format(precision).parts(weight.shape, weight.out_axis, weight.dtype)
        },
    )


def _pools(slots: Slots, weight: Weight) -> dict[str, list[int]]:
    """Slots by the precision the weight is held in; biases stay as they are, stacked over all slots."""
    if weight.quantizable:
        return slots.table.pools
    return {"original": list(range(slots.table.num_slots))}


def install(module: nn.Module, slots: Slots, tensors: dict[str, torch.Tensor]) -> None:
    """Put the slots' tensors in the place of the module's own weights."""
    slots.layout.drop()
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    module.equipoise_slots = slots  # type: ignore[assignment]
    # transformers initialises what it takes for missing on load; these are never missing.
    module._is_hf_initialized = True  # type: ignore[assignment]
    if not is_dispatched(slots.layout):
        module.__class__ = _undispatched(type(module))


def _undispatched(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose forward runs the slots, for a family outside the experts interface."""
    return type(cls.__name__, (cls,), {"forward": experts_forward, "__module__": cls.__module__})


def dispatch(model: PreTrainedModel) -> None:
    """Select the registered implementation; layers without slots keep the one they had."""
    base = model.config._experts_implementation
    if base in (None, IMPLEMENTATION):
        base = model.get_correct_experts_implementation(None)
    for layer in find_layers(model):
        layer.experts.equipoise_base = base
    model.set_experts_implementation(IMPLEMENTATION)
    # A plain attribute survives save_pretrained into config.json, where it makes a load without `import
    # equipoise` a hard error: transformers refuses an experts implementation that nobody registered.
    model.config.experts_implementation = IMPLEMENTATION


def plan_of(model: PreTrainedModel) -> Plan | None:
    """The plan a model carries, or None."""
    config = getattr(model.config, "quantization_config", None)
    document = config.get("plan") if isinstance(config, dict) else getattr(config, "plan", None)
    return None if document is None else plan_from_json(document)
