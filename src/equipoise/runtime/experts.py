"""The experts implementation: slots of mixed precision behind transformers' experts interface.

    y[t] = sum_j w[t, j] * f_{slot(t, j)}(x[t])        slot = SlotTable.assign(top-k experts)

Selections are sorted by slot once, each slot computes its rows, results go back to [T, k, H] and are summed over
k in one reduction (no atomics: the same on every device). Lower precisions are decoded to the compute dtype for
each call: right on every device; fast kernels are a matter of their own.
A layer that the plan left as it was keeps its own parameters and runs the implementation it had before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from equipoise.formats import get_format
from equipoise.models.families import read_routing
from equipoise.models.layout import ExpertsLayout
from equipoise.runtime.slots import SlotTable
from equipoise.types import LayerPlan

IMPLEMENTATION = "equipoise"


class Slots:
    """What a balanced experts module carries as a plain attribute, `equipoise_slots`.

    The stored tensors are parameters of the module, named `<weight>_<precision><suffix>`, stacked over the slots
    of that precision.
    """

    def __init__(self, layout: ExpertsLayout, layer: LayerPlan) -> None:
        self.layout = layout
        self.table = SlotTable(layer)

    def weight(self, name: str, slot: int, dtype: torch.dtype) -> torch.Tensor:
        """Weight `name` of a slot, decoded to `dtype`."""
        weight = next(w for w in self.layout.weights if w.name == name)
        precision = self.table.precision[slot] if weight.quantizable else "original"
        # Biases are stacked over all slots.
        place = self.table.pool_index[slot] if weight.quantizable else slot
        form = get_format(precision)
        module = self.layout.module
        stored = {
            part.suffix: getattr(module, stored_name(name, precision, part.suffix))[place]
            for part in form.parts(weight.shape, weight.out_axis, weight.dtype)
        }
        return form.decode(stored, weight.out_axis, dtype)


def stored_name(weight: str, precision: str, suffix: str) -> str:
    """Name of a stored tensor, as in the checkpoint."""
    return f"{weight}_{precision}{suffix}"


def slots_forward(slots: Slots, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Routed experts of one layer.

    Args:
        slots: of the layer.
        hidden: [T, H].
        index: int64 [T, k] experts; E where a selection was dropped (it adds nothing).
        weights: [T, k] routing weights.

    Returns:
        [T, H] in the dtype of `hidden`.
    """
    rows, k = index.shape
    slot = slots.table.assign(index).reshape(-1)
    order = torch.argsort(slot, stable=True)
    # minlength S + 1: the sentinel slot S holds the dropped selections, sorted last and never computed.
    counts = torch.bincount(slot, minlength=slots.table.num_slots + 1).tolist()
    x = hidden[order // k]
    out = torch.zeros(rows * k, hidden.shape[-1], dtype=torch.result_type(hidden, weights), device=hidden.device)
    flat_weights = weights.reshape(-1)
    begin = 0
    for s in range(slots.table.num_slots):
        if counts[s]:
            where = order[begin : begin + counts[s]]

            def get(name: str, s: int = s) -> torch.Tensor:
                return slots.weight(name, s, hidden.dtype)

            y, _ = slots.layout.compute(x[begin : begin + counts[s]], get)
            out[where] = y * flat_weights[where, None]
            begin += counts[s]
    return out.view(rows, k, hidden.shape[-1]).sum(dim=1).to(hidden.dtype)


def experts_forward(module: nn.Module, *arguments: Any, **keywords: Any) -> torch.Tensor:
    """What is registered as `experts_implementation="equipoise"`."""
    slots: Slots | None = getattr(module, "equipoise_slots", None)
    if slots is None:
        return _base_forward(module)(module, *arguments, **keywords)
    routing = read_routing(slots.layout, (*arguments, *keywords.values()))
    return slots_forward(slots, routing.hidden, routing.index, routing.weights)


def _base_forward(module: nn.Module) -> Any:
    """The implementation a layer without slots had before (transformers' own default when it was loaded so)."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    base = getattr(module, "equipoise_base", "eager")
    if base == "eager":
        return type(module).forward.__wrapped__  # type: ignore[attr-defined]
    return ALL_EXPERTS_FUNCTIONS[base]
