"""The experts implementation: slots of mixed precision behind transformers' experts interface.

    y[t] = sum_j w[t, j] * f_{slot(t, j)}(x[t])        slot = SlotTable.assign(top-k experts)

Selections are sorted by slot once, each slot computes its rows, results are summed over k in one reduction (no
atomics: the same on every device). bfloat16 models run on packed weights on a CPU with matrix instructions
(`kernels.onednn`), on plain weights on other x86 CPUs (`kernels.vector`) and through grouped products on a GPU
(`kernels.grouped`); everything else runs the formats' plain arithmetic, which says what the kernels must give.
A layer that the plan left as it was keeps its own parameters and runs the implementation it had before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from equipoise.formats import get_format
from equipoise.models.families import read_routing
from equipoise.models.layout import ExpertsLayout
from equipoise.runtime.kernels import few_rows, grouped, onednn, vector
from equipoise.runtime.kernels.packed import PackedWeight
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

    def stored(self, name: str, precision: str, suffix: str = "") -> torch.Tensor:
        """A stored tensor, [slots of the precision, ...]; biases are `original` and stacked over all slots."""
        # Not get_parameter, which splits and checks the path at each call.
        return self.layout.module._parameters[stored_name(name, precision, suffix)]  # type: ignore[no-any-return]

    def leave_cpu(self, device: torch.device) -> None:
        """Plain weights on `device` in place of packed ones, which are in the CPU's layout wherever the module went."""
        few_rows.forget(self)
        parameters = self.layout.module._parameters
        for name, stored in parameters.items():
            if isinstance(stored, PackedWeight):
                parameters[name] = nn.Parameter(stored.unpack().to(device), requires_grad=False)

    def _where(self, name: str, slot: int) -> tuple[str, int]:
        """Precision a weight of a slot is held in, and its place among the stored ones."""
        quantizable = self.layout.weight(name).quantizable
        return (self.table.precision[slot], self.table.pool_index[slot]) if quantizable else ("original", slot)

    def read(self, name: str, slot: int) -> dict[str, torch.Tensor]:
        """The stored tensors of one slot by suffix, plain; those of packed weights are copies."""
        precision, place = self._where(name, slot)
        weight = self.layout.weight(name)
        out = {}
        for part in get_format(precision).parts(weight.shape, weight.out_axis, weight.dtype):
            stored = self.stored(name, precision, part.suffix)
            out[part.suffix] = stored.slot(place) if isinstance(stored, PackedWeight) else stored[place]
        return out

    @torch.no_grad()
    def write(self, name: str, slot: int, tensors: dict[str, torch.Tensor]) -> None:
        """Replace the stored tensors of one slot, in its own precision."""
        precision, place = self._where(name, slot)
        for suffix, tensor in tensors.items():
            stored = self.stored(name, precision, suffix)
            if isinstance(stored, PackedWeight):
                stored.replace(place, tensor)
            else:
                stored[place].copy_(tensor)

    def weight(self, name: str, slot: int, dtype: torch.dtype) -> torch.Tensor:
        """Weight `name` of a slot, decoded to `dtype`."""
        form = get_format(self._where(name, slot)[0])
        return form.decode(self.read(name, slot), self.layout.weight(name).out_axis, dtype)


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
        [T, H] in the dtype of `hidden`. A backward pass through it is an error: balanced models are for inference.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad):
        return _ForInference.apply(hidden, weights, slots, index)  # type: ignore[no-any-return]
    if not hidden.is_cpu:
        slots.leave_cpu(hidden.device)
    with torch.no_grad():
        found = few_rows.ready(slots, hidden, index.numel())
        if found is not None:
            return few_rows.run(found, hidden, index, weights)
        run = next((k.forward for k in (onednn, vector, grouped) if k.is_ready(slots, hidden)), plain_forward)
        return run(slots, hidden, index, weights)


class _ForInference(torch.autograd.Function):
    """The forward of models that are called with gradients on; nobody asked for them yet."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weights: torch.Tensor, slots: Slots, index: torch.Tensor
    ) -> torch.Tensor:
        return slots_forward(slots, hidden, index, weights)

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        raise RuntimeError("experts balanced by equipoise are for inference: train the original model")


def plain_forward(slots: Slots, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`slots_forward` in tensor operations: any device, any dtype."""
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

            def linear(name: str, rows: torch.Tensor, s: int = s) -> torch.Tensor:
                weight = slots.layout.weight(name)
                form = get_format(slots.table.precision[s])
                y = form.linear(rows, slots.read(name, s), weight.out_axis)
                return y if weight.bias is None else y + slots.read(weight.bias, s)[""]

            y, _ = slots.layout.compute(x[begin : begin + counts[s]], linear)
            out[where] = y * flat_weights[where, None]
            begin += counts[s]
    return out.view(rows, k, hidden.shape[-1]).sum(dim=1).to(hidden.dtype)


def experts_forward(module: nn.Module, *arguments: Any, **keywords: Any) -> torch.Tensor:
    """What is registered as `experts_implementation="equipoise"`."""
    # `disable` keeps a compiled model from tracing into the kernels; each call through it takes time.
    run = _not_compiled if torch.compiler.is_dynamo_compiling() else _forward
    return run(module, *arguments, **keywords)  # type: ignore[no-any-return]


def _forward(module: nn.Module, *arguments: Any, **keywords: Any) -> torch.Tensor:
    slots: Slots | None = getattr(module, "equipoise_slots", None)
    if slots is None:
        return _base_forward(module)(module, *arguments, **keywords)
    routing = read_routing(slots.layout, (*arguments, *keywords.values()))
    return slots_forward(slots, routing.hidden, routing.index, routing.weights)


_not_compiled = torch.compiler.disable(_forward)


def _base_forward(module: nn.Module) -> Any:
    """The implementation a layer without slots had before (transformers' own default when it was loaded so)."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    base = getattr(module, "equipoise_base", "eager")
    if base == "eager":
        return type(module).forward.__wrapped__  # type: ignore[attr-defined]
    return ALL_EXPERTS_FUNCTIONS[base]
