"""How much the model's predictions change when every expert of one layer is at low precision, measured.

    D[l] = mean_t KL( p[t] || p_l[t] )     p: next-token distribution of the model as it is, p_l: with layer l lowered

A gradient (`sensitivity`) sees a change as long as it is small. Where it sends tokens to other experts in a layer
further on, the output jumps, and a layer with many routers above it is worth more than gradients say. So the model is
run again, once for each layer and from that layer on (`replay`), with its experts as a plan would hold them, in
float32 arithmetic (`float32` says why). Beside the model are held one layer's experts at low precision, the predictions
of the tokens as they were, and what each block gave for them.

L layers, B sequences, Q their length, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from equipoise.errors import InputError
from equipoise.models.families import MoELayer, read_routing
from equipoise.profiling.float32 import in_float32
from equipoise.profiling.replay import Replay
from equipoise.progress import Track, quietly
from equipoise.runtime.experts import Slots, slots_forward
from equipoise.runtime.install import check_weights, fill_layer
from equipoise.types import FloatArray, LayerPlan, Precision, Slot

ROWS = 512
"""Rows of logits that are compared at a time."""


@torch.no_grad()
def lowered_divergence(
    model: PreTrainedModel,
    layers: list[MoELayer],
    inputs: Sequence[dict[str, Any]],
    precision: Precision,
    *,
    track: Track = quietly,
) -> FloatArray:
    """What each layer at low precision does to the predictions.

    Args:
        model: the original, in evaluation mode.
        layers: of the model.
        inputs: what the model is called with; tensors [B, Q]. Their logits are held, float32 [T, V], and their hidden
            states.
        precision: of all experts of the layer that is lowered.
        track: progress, over layers.

    Returns:
        float64 [L], nats a token; tokens that are padding do not count.

    Raises:
        InputError: a weight is beyond the precision, or predictions are NaN or inf.
    """
    found = np.zeros(len(layers))
    with in_float32(model):
        replay = Replay(model, inputs, functools.partial(_predictions, model))
        for row, layer in enumerate(track(layers, len(layers), "lowering layers")):
            with lowered(layer, precision):
                for number, before in enumerate(replay.before):
                    found[row] += _divergence(before, replay.after(number, layer.experts))
            if not np.isfinite(found[row]):
                raise InputError(f"the predictions are NaN or inf with layer {layer.layer_id} in {precision}")
        return found / sum(map(len, replay.before))


@contextmanager
def lowered(layer: MoELayer, precision: Precision, experts: Collection[int] | None = None) -> Iterator[None]:
    """A layer computes with experts at a precision, its own weights untouched.

    Args:
        layer: of an untouched model.
        precision: of the experts.
        experts: which; None: all.

    Raises:
        InputError: a weight is beyond the precision.
    """
    slots = _slots(layer, precision, range(layer.num_experts) if experts is None else experts)

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        routing = read_routing(layer.layout, (*args, *kwargs.values()))
        out = output[0] if isinstance(output, tuple) else output
        low = slots_forward(slots, routing.hidden, routing.index, routing.weights).to(out.dtype).view_as(out)
        return (low, *output[1:]) if isinstance(output, tuple) else low

    handle = layer.experts.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _slots(layer: MoELayer, precision: Precision, experts: Collection[int]) -> Slots:
    """One slot an expert, in a twin of the module that shares everything but the expert weights."""
    slots = tuple(Slot(e, precision if e in experts else "original") for e in range(layer.num_experts))
    plan = LayerPlan(layer.layer_id, layer.name, layer.num_experts, slots)
    check_weights(layer, plan)
    module: Any = copy.copy(layer.experts)
    for name in ("_parameters", "_modules"):
        module.__dict__[name] = copy.copy(module.__dict__[name])
    layout = copy.copy(layer.layout)
    layout.module = module
    fill_layer(dataclasses.replace(layer, experts=module, layout=layout), plan)
    return module.equipoise_slots  # type: ignore[no-any-return]


def _predictions(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    """Logits, float32 [T, V], of the tokens that are not padding."""
    logits = model(**inputs).logits
    mask = inputs.get("decoder_attention_mask") if "decoder_input_ids" in inputs else inputs["attention_mask"]
    flat: torch.Tensor = logits.reshape(-1, logits.shape[-1]) if mask is None else logits[mask.bool().to(logits.device)]
    return flat


def _divergence(before: torch.Tensor, after: torch.Tensor) -> float:
    """Sum over tokens of KL(p || p') in nats; exact also where it is tiny, where logarithms of p would cancel.

    With d = z' - z the change of the logits and u = d - E_p[d], KL = log1p(E_p[exp(u) - 1 - u]).
    """
    total = 0.0
    for z, low in zip(before.split(ROWS), after.split(ROWS), strict=True):
        p, d = z.softmax(-1), low - z
        u = d - (p * d).sum(-1, keepdim=True)
        total += float(((torch.expm1(u) - u) * p).sum(-1).clamp_(min=0).log1p_().double().sum())
    return total
