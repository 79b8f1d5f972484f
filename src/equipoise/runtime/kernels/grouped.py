"""The forward of a balanced layer on a GPU: every slot of a precision in one grouped product, nothing read back.

    rows sorted by (precision, slot); where each slot's rows end, on the device
    -> up     original          torch's grouped GEMM over the stacked weights
              int8              tokens quantized once before dispatch, s8 x s8 -> s32, both scales (Triton)
              int8_weight_only  16 bits x int8 decoded in registers (Triton); float16 likewise
    -> gate   the family's own, on all rows at once
    -> down   as up
    -> weighted sum over k in one reduction, no atomics

All sizes of tensors and launches follow from T, k and the plan, so the host never waits for the device and a layer can
be captured in a CUDA graph. Where Triton is missing or cannot compile, `kernels.slotwise` computes the low precisions
slot by slot, with one synchronisation a layer. A log line says which. EQUIPOISE_CUDA_KERNELS asks for another choice:
`triton` (the default), `triton_all` (original slots too), `torch` (no Triton).

The Triton kernels are tested in Triton's interpreter, everything else on the CPU too; see docs/experiments.md for what
has been measured on a GPU.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from equipoise.errors import InputError
from equipoise.formats import get_format, quantize_rows
from equipoise.models.layout import Weight
from equipoise.runtime.kernels import slotwise
from equipoise.runtime.kernels.slotwise import Quantized

if TYPE_CHECKING:
    from equipoise.runtime.experts import Slots

CHOICES = ("triton", "triton_all", "torch")
VARIABLE = "EQUIPOISE_CUDA_KERNELS"
_log = logging.getLogger("equipoise")


@lru_cache
def _capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def is_ready(slots: Slots, hidden: torch.Tensor) -> bool:
    """Whether this batch can take the grouped path: bfloat16 on a CUDA device of compute capability 8.0 and more."""
    return hidden.is_cuda and hidden.dtype == slots.layout.dtype == torch.bfloat16 and _capable(hidden.device)


def choice(device: torch.device) -> tuple[str, ModuleType | None]:
    """Which kernels run on a device, and the Triton ones.

    Raises:
        InputError: the environment variable names no choice.
    """
    return _choice(os.environ.get(VARIABLE, CHOICES[0]), device)


@lru_cache
def _choice(wanted: str, device: torch.device) -> tuple[str, ModuleType | None]:
    if wanted not in CHOICES:
        raise InputError(f"{VARIABLE} is {wanted!r}: it must be one of {', '.join(CHOICES)}")
    found: ModuleType | None = None
    if wanted != "torch":
        try:
            from equipoise.runtime.kernels import triton_grouped

            # Triton needs a C compiler on the machine: a kernel of one row shows whether it can be had.
            triton_grouped.quantize(torch.zeros((1, 16), dtype=torch.bfloat16, device=device))
            found = triton_grouped
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            _log.warning("Triton cannot be used on %s (%s): low precision runs slot by slot", device, reason)
    _log.info(
        "balanced experts on %s: %s slots by %s, low precision by %s",
        device,
        torch.bfloat16,
        "Triton" if found and wanted == "triton_all" else "torch._grouped_mm",
        "Triton" if found else "torch._int_mm, slot by slot",
    )
    return (wanted if found else "torch"), found


@dataclass(frozen=True)
class Dispatch:
    """Selections sorted by slot, in the order of the pools; dropped ones last. All on the device of the batch.

    Attributes:
        place: [R] row of each selection.
        tokens: [R] token of each row.
        position: [R] slot of each row, by its number in the order of the pools; S where dropped.
        ends: int32 [S], where the rows of each slot end.
    """

    place: torch.Tensor
    tokens: torch.Tensor
    position: torch.Tensor
    ends: torch.Tensor


def dispatch(slots: Slots, index: torch.Tensor, kernels: ModuleType | None = None) -> Dispatch:
    """Sort the selections int64 [T, k] of a batch; a stable sort, so rows of a slot are in the order of the batch."""
    table = slots.table
    device = index.device
    if kernels is not None and index.numel() <= kernels.SMALL:
        return Dispatch(*kernels.dispatch(index, *table.patterns(device), table.positions(device)))
    selected = table.positions(device)[table.assign(index).reshape(-1)]
    position, order = torch.sort(selected, stable=True)
    numbers = torch.arange(table.num_slots, device=device)
    ends = torch.searchsorted(position, numbers, right=True, out_int32=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=device)
    return Dispatch(place, order // index.shape[1], position, ends)


def forward(slots: Slots, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Routed experts of one layer; see `experts.slots_forward` for arguments and result."""
    if not index.numel():
        return torch.zeros_like(hidden)
    wanted, kernels = choice(hidden.device)
    sorted_ = dispatch(slots, index, kernels)
    y, _ = slots.layout.compute(_Tokens(hidden), _Products(slots, sorted_, wanted, kernels).linear)  # type: ignore[arg-type]
    if kernels is not None:
        return kernels.combine(y, weights, sorted_.place, sorted_.ends)  # type: ignore[no-any-return]
    # Rows of dropped selections hold what was in memory, NaN perhaps: they are replaced, not multiplied by 0.
    dropped = (sorted_.position >= slots.table.num_slots)[sorted_.place, None]
    y = y[sorted_.place].float() * weights.reshape(-1, 1).float()
    return y.masked_fill_(dropped, 0).view(*index.shape, -1).sum(1).to(hidden.dtype)


@dataclass(frozen=True)
class _Tokens:
    """Hidden states [T, H] that are not dispatched yet; any other input of a product is rows."""

    hidden: torch.Tensor


class _Products:
    """The products of one layer and batch; `linear` is what the layout computes with."""

    def __init__(self, slots: Slots, rows: Dispatch, wanted: str, kernels: ModuleType | None) -> None:
        self.slots, self.rows, self.wanted, self.kernels = slots, rows, wanted, kernels
        self._bounds: list[int] | None = None

    def linear(self, name: str, x: torch.Tensor | _Tokens) -> torch.Tensor:
        """bfloat16 [R, out] of [R, in], or of the hidden states; the bias included. Dropped rows hold anything."""
        weight = self.slots.layout.weight(name)
        inputs = _Inputs(x, self.rows.tokens, self.kernels)
        width = weight.shape[weight.out_axis]
        y: torch.Tensor | None = None
        first = 0
        for precision, members in self.slots.table.pools.items():
            if precision == "original" and self.wanted != "triton_all" and _aligned(weight):
                stored = self.slots.stored(name, precision)
                stack = stored.transpose(-2, -1) if weight.out_axis == -2 else stored
                # The first pool: rows behind its last slot are left as they are, for the pools that follow.
                y = torch._grouped_mm(inputs.rows(), stack, offs=self.rows.ends[: len(members)])
            else:
                if y is None:
                    y = torch.empty(
                        (len(self.rows.tokens), width), dtype=torch.bfloat16, device=self.rows.tokens.device
                    )
                self._pool(weight, precision, first, members, inputs, y)
            first += len(members)
        if y is None:
            raise AssertionError("a layer has at least one slot")
        if weight.bias is not None:
            biases = self.slots.stored(weight.bias, "original")
            order = self.slots.table.in_order(y.device)
            last = self.slots.table.num_slots - 1  # dropped rows get some bias too, and are never read
            y = y + biases[order[self.rows.position.clamp(max=last)]]
        return y

    def _pool(
        self, weight: Weight, precision: str, first: int, members: list[int], inputs: _Inputs, y: torch.Tensor
    ) -> None:
        """One pool, into `y`."""
        stored = {
            part.suffix: self.slots.stored(weight.name, precision, part.suffix)
            for part in get_format(precision).parts(weight.shape, weight.out_axis, weight.dtype)
        }
        int8 = precision == "int8"
        if self.kernels is None:
            bounds = self._ends()[first : first + len(members) + 1]
            x = inputs.quantized_rows() if int8 else inputs.rows()
            slotwise.linear(x, stored, precision, weight.out_axis, bounds, y)
            return
        x, tokens = inputs.quantized() if int8 else inputs.plain()
        self.kernels.linear(
            x.q if isinstance(x, Quantized) else x,
            stored[""],
            y,
            self.rows.ends,
            first,
            out_axis=weight.out_axis,
            tokens=tokens,
            x_scale=x.scale if isinstance(x, Quantized) else None,
            scale=stored.get("_scale"),
        )

    def _ends(self) -> list[int]:
        """0 and the ends of all slots on the host: the one synchronisation of a layer without Triton."""
        if self._bounds is None:
            self._bounds = [0, *self.rows.ends.tolist()]
        return self._bounds


class _Inputs:
    """The input of one product in the forms that its pools want, each made once."""

    def __init__(self, x: torch.Tensor | _Tokens, tokens: torch.Tensor, kernels: ModuleType | None) -> None:
        self._tokens = tokens if isinstance(x, _Tokens) else None
        self._x = x.hidden if isinstance(x, _Tokens) else x
        self._quantize: Any = quantize_rows if kernels is None else kernels.quantize
        self._rows: torch.Tensor | None = None
        self._quantized: Quantized | None = None

    def plain(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Input, and the row of it that each row reads (None: its own)."""
        return self._x, self._tokens

    def quantized(self) -> tuple[Quantized, torch.Tensor | None]:
        """As `plain`, rounded to int8."""
        if self._quantized is None:
            self._quantized = Quantized(*self._quantize(self._x))
        return self._quantized, self._tokens

    def rows(self) -> torch.Tensor:
        """[R, in]."""
        if self._rows is None:
            self._rows = self._x.contiguous() if self._tokens is None else self._x.index_select(0, self._tokens)
        return self._rows

    def quantized_rows(self) -> Quantized:
        """[R, in] rounded to int8."""
        found, tokens = self.quantized()
        return found if tokens is None else found.take(tokens)


def _aligned(weight: Weight) -> bool:
    """Whether torch's grouped product takes a 16-bit weight: rows of both operands begin at multiples of 16 bytes."""
    return all(size % 8 == 0 for size in weight.shape)
