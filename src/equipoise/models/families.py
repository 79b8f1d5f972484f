"""Finding the MoE layers of a model and reading its routing: everything that differs between families.

A supported family either dispatches its experts through transformers' experts interface
(`use_experts_implementation`) or is Switch Transformers. Everything else is refused with the reason.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from equipoise.errors import InputError
from equipoise.models.layout import LAYOUTS, ExpertsLayout, FusedLayout, SwitchLayout

_BLOCK = re.compile(r"(?:^|\.)(?:layers|layer|block|blocks|h)\.(\d+)\.")


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a model.

    Attributes:
        layer_id: the model's own number of the layer; decoder layers of an encoder-decoder count on.
        name: module path of the experts.
        experts: the module.
        num_experts: E.
        layout: how it holds its weights; kept when a plan has replaced them.
    """

    layer_id: int
    name: str
    experts: nn.Module = field(repr=False, compare=False)
    num_experts: int
    layout: ExpertsLayout = field(repr=False, compare=False)


def layout_of(module: nn.Module) -> ExpertsLayout | None:
    """The layout of an experts module, balanced or not; None for any other module."""
    balanced = getattr(module, "equipoise_slots", None)
    if balanced is not None:
        return balanced.layout
    for layout in LAYOUTS:
        if layout.matches(module):
            return layout(module)
    return None


def find_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model, in module order.

    Raises:
        InputError: no routed experts, a family whose experts cannot be dispatched, or layers that differ in E.
    """
    config: Any = getattr(model, "config", None)
    layers = []
    for name, module in model.named_modules():
        layout = layout_of(module)
        if layout is not None:
            layers.append(MoELayer(_layer_id(name, config), name, module, layout.num_experts, layout))
    if not layers:
        raise InputError(_why_not(model))
    sizes = {layer.num_experts for layer in layers}
    if len(sizes) > 1:
        raise InputError(
            f"model_type {config.model_type!r} has layers with {sorted(sizes)} experts; "
            "equipoise needs the same number in every MoE layer"
        )
    return layers


def _layer_id(name: str, config: Any) -> int:
    """Block number in the module path; decoder blocks are numbered after the encoder's."""
    match = _BLOCK.search(name)
    number = int(match.group(1)) if match else 0
    if getattr(config, "is_encoder_decoder", False) and re.search(r"(?:^|\.)decoder\.", name):
        number += int(config.num_layers)
    return number


def _why_not(model: nn.Module) -> str:
    """Why a model has no layer that can be balanced, in one line."""
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    kinds = {type(module).__name__ for module in model.modules()}
    experts = sorted(kind for kind in kinds if "expert" in kind.lower() or kind.endswith(("MoE", "Moe", "MoeBlock")))
    if experts:
        return (
            f"model_type {family!r} is not supported: it keeps its experts in {', '.join(experts)}, outside "
            "transformers' experts interface; see the README for the families that are supported"
        )
    return f"model_type {family!r} is not a Mixture-of-Experts model: it has no routed experts to balance"


@dataclass(frozen=True)
class Routing:
    """What the router decided for a batch.

    Attributes:
        hidden: [rows, H] input of the experts.
        index: int64 [rows, k]; E where a token was dropped.
        weights: [rows, k].
    """

    hidden: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor


def read_routing(layout: ExpertsLayout, arguments: tuple[Any, ...]) -> Routing:
    """Routing from the positional arguments of the experts module's forward.

    Switch passes a one-hot [rows, 1, E] in which tokens beyond the expert's capacity are all zero.
    ZAYA's router may choose to skip all experts; it then passes expert 0 with a probability of exactly 0.
    """
    hidden, selected, weights = arguments[:3]
    if isinstance(layout, SwitchLayout):
        one_hot = selected.reshape(-1, layout.num_experts)
        index = torch.where(one_hot.any(-1), one_hot.argmax(-1), layout.num_experts)
        return Routing(hidden, index[:, None], weights.reshape(-1, 1))
    if type(layout.module).__name__ == "ZayaExperts":
        selected = selected.masked_fill(weights == 0, layout.num_experts)
    return Routing(hidden.reshape(-1, hidden.shape[-1]), selected, weights)


def is_dispatched(layout: ExpertsLayout) -> bool:
    """True when transformers' experts interface calls the implementation; False when the class must be swapped."""
    return isinstance(layout, FusedLayout)
