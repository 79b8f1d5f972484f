"""Packing the slots of a model for the CPU it is on, once, when the model has got them.

A weight is packed where its dtype has matrix instructions on this processor and the model computes in bfloat16;
elsewhere it stays a plain tensor, for products on vector instructions (x86, float32 models too), grouped ones (on a
GPU), or the plain path. A log line says which.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from equipoise.memory import frugal_memory
from equipoise.models.families import MoELayer
from equipoise.runtime.experts import Slots, stored_name
from equipoise.runtime.kernels import vector
from equipoise.runtime.kernels.packed import PackedWeight, can_pack, instructions

_log = logging.getLogger("equipoise")


def pack_layer(layer: MoELayer) -> bool:
    """Pack the slots of one layer where they can be; whether they are. Working memory: one weight of the layer."""
    module: Any = layer.experts
    slots: Slots | None = getattr(module, "equipoise_slots", None)
    if slots is None or slots.layout.dtype != torch.bfloat16 or "float16" in slots.table.pools:
        return False
    weights = [weight for weight in slots.layout.weights if weight.quantizable]
    found = [(w, stored_name(w.name, precision, "")) for w in weights for precision in slots.table.pools]
    tensors = [module._parameters[name] for _, name in found]
    if not all(t.device.type == "cpu" and can_pack(t.dtype) for t in tensors):
        return False
    del tensors
    for weight, name in found:
        if not isinstance(module._parameters[name], PackedWeight):
            packed = PackedWeight.pack(module._parameters[name], weight.out_axis)
            module._parameters[name] = nn.Parameter(packed, requires_grad=False)
    if _plain_state not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_plain_state)
    return True


def pack_layers(layers: list[MoELayer]) -> int:
    """Pack all layers and say what will run; how many are packed."""
    with frugal_memory():
        packed = sum(pack_layer(layer) for layer in layers)
    slots = sum(hasattr(layer.experts, "equipoise_slots") for layer in layers)
    if packed:
        _log.info("experts of %d of %d layers packed for oneDNN (%s)", packed, len(layers), instructions())
    on_gpu = sum(_on_gpu(layer) for layer in layers)
    if on_gpu:
        _log.info("experts of %d of %d layers are on a GPU: grouped products for bfloat16", on_gpu, len(layers))
    vectors = sum(_on_vectors(layer) for layer in layers)
    if vectors:
        _log.info(
            "experts of %d of %d layers run on float32 vector instructions: %s",
            vectors,
            len(layers),
            _why_vectors(layers),
        )
    if slots > packed + on_gpu + vectors:
        _log.info(
            "experts of %d layers run in plain operations: the kernels want a bfloat16 model (on a CPU, float32 too) "
            "without float16 slots, on an x86 CPU or a GPU",
            slots - packed - on_gpu - vectors,
        )
    return packed


def _on_gpu(layer: MoELayer) -> bool:
    balanced = hasattr(layer.experts, "equipoise_slots")
    return balanced and any(parameter.is_cuda for parameter in layer.experts.parameters())


def _on_vectors(layer: MoELayer) -> bool:
    slots: Slots | None = getattr(layer.experts, "equipoise_slots", None)
    return slots is not None and vector.suits(slots)


def _why_vectors(layers: list[MoELayer]) -> str:
    if layers[0].layout.dtype == torch.float32:
        return "the model computes in float32"
    return "this processor has no matrix instructions for bfloat16"


def leave_file(model: nn.Module) -> None:
    """Take what is not packed out of the mapped checkpoint, so that the file's pages are not held beside the packs.

    A mapping lives as long as one tensor in it, with every page that was read: the plain experts too.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if not isinstance(tensor, PackedWeight) and tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _plain_state(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A checkpoint holds plain tensors."""
    for name, parameter in module._parameters.items():
        if isinstance(parameter, PackedWeight) and f"{prefix}{name}" in state:
            state[f"{prefix}{name}"] = parameter.unpack()
