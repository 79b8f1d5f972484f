"""True bytes of slots: as a format states them, and as counted on a model's own tensors."""

from __future__ import annotations

from transformers import PreTrainedModel

from equipoise.formats import get_format
from equipoise.models.families import MoELayer, find_layers
from equipoise.models.layout import ExpertsLayout


def slot_bytes(layout: ExpertsLayout, precision: str) -> int:
    """True bytes of one slot: its weights in that precision, scales and biases included."""
    return sum(
        part.nbytes
        for weight in layout.weights
        for part in get_format(precision if weight.quantizable else "original").parts(
            weight.shape, weight.out_axis, weight.dtype
        )
    )


def expert_bytes(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """Actual tensor bytes of the routed experts, counted on the model's own tensors.

    Returns:
        layer name -> precision -> bytes (biases count as `original`).
    """
    return {layer.name: stored_bytes(layer) for layer in find_layers(model)}


def stored_bytes(layer: MoELayer) -> dict[str, int]:
    """Actual tensor bytes of one layer's experts by precision (biases count as `original`)."""
    balanced = hasattr(layer.experts, "equipoise_slots")
    sizes: dict[str, int] = {}
    for name, parameter in layer.experts.named_parameters():
        if layer.layout.is_expert_weight(name):
            precision = _precision_of(name, layer.layout) if balanced else "original"
            sizes[precision] = sizes.get(precision, 0) + parameter.numel() * parameter.element_size()
    return sizes


def _precision_of(name: str, layout: ExpertsLayout) -> str:
    """Precision of a stored tensor by its name; the longest weight name wins (`down_proj_bias`)."""
    for weight in sorted(layout.weights, key=lambda w: -len(w.name)):
        if name.startswith(f"{weight.name}_"):
            return name.removeprefix(f"{weight.name}_").removesuffix("_scale")
    return "original"
