"""The forward of a balanced layer on a GPU: grouped GEMMs for 16-bit slots, int8 matmul for int8 slots, as torch ships.

    rows sorted by (precision, slot) -> for each precision
        original           one grouped GEMM over the stacked weights of its slots
        int8               tokens quantized once before dispatch, `_int_mm` slot by slot (s8 x s8 -> s32), both scales
        int8_weight_only   the weight decoded slot by slot, then a GEMM
    -> weighted sum over k in one reduction

It works on any device torch has these products for, the CPU included, which is how it is tested here; it has not run
on a GPU yet, and its speed there is not known. One synchronisation a layer: the rows of each slot are read back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from equipoise.formats import get_format, quantize_rows

if TYPE_CHECKING:
    from equipoise.runtime.experts import Slots

_LEAST = 32
"""Rows `_int_mm` is run with: cuBLASLt wants more than 16, and a multiple of 8."""


def is_ready(slots: Slots, hidden: torch.Tensor) -> bool:
    """Whether this batch can take the grouped path: bfloat16 on a CUDA device of compute capability 8.0 and more."""
    return (
        hidden.dtype == slots.layout.dtype == torch.bfloat16
        and hidden.is_cuda
        and torch.cuda.get_device_capability(hidden.device) >= (8, 0)
    )


@dataclass(frozen=True)
class _Quantized:
    """Rows quantized before dispatch: int8 [n, in], float32 [n, 1]."""

    q: torch.Tensor
    scale: torch.Tensor


def int8_linear(x: _Quantized, weight: torch.Tensor, scale: torch.Tensor, out_axis: int) -> torch.Tensor:
    """bfloat16 [n, out] of int8 rows and one slot's int8 weight, as `formats.Int8.linear` has it."""
    rows, width = x.q.shape
    matrix = weight if out_axis == -2 else weight.t().contiguous()
    pad = (-len(matrix)) % 8, (-width) % 8
    if any(pad):  # no family has such sizes; tiny models do
        matrix = torch.nn.functional.pad(matrix, (0, pad[1], 0, pad[0]))
    padded = torch.nn.functional.pad(x.q, (0, pad[1], 0, max(_LEAST - rows, -rows % 8)))
    y = torch._int_mm(padded, matrix.t())[:rows, : scale.numel()]
    return ((y * scale.reshape(1, -1)).to(torch.bfloat16) * x.scale).to(torch.bfloat16)


def forward(slots: Slots, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Routed experts of one layer; see `experts.slots_forward` for arguments and result."""
    table = slots.table
    position = table.positions(hidden.device)[table.assign(index).reshape(-1)]
    order = torch.argsort(position, stable=True)
    # The sentinel comes last: dropped selections are never computed.
    counts = torch.bincount(position, minlength=table.num_slots + 1).tolist()[:-1]
    kept = order[: sum(counts)]
    tokens = kept // index.shape[1]
    quantized = _Quantized(*quantize_rows(hidden)) if "int8" in table.pools else None
    parts = []
    begin = first = 0
    for precision, members in table.pools.items():
        pool = counts[first : first + len(members)]
        first += len(members)
        chosen = tokens[begin : begin + sum(pool)]
        begin += sum(pool)
        if len(chosen):
            x: Any = hidden[chosen]
            if precision == "int8" and quantized is not None:
                x = _Quantized(quantized.q[chosen], quantized.scale[chosen])
            y, _ = slots.layout.compute(x, _linear(slots, precision, members, pool))
            parts.append(y)
    out = torch.zeros((index.numel(), hidden.shape[1]), dtype=torch.float32, device=hidden.device)
    if parts:
        out[kept] = torch.cat(parts).float() * weights.reshape(-1)[kept, None].float()
    return out.view(*index.shape, hidden.shape[1]).sum(1).to(hidden.dtype)


def _linear(slots: Slots, precision: str, members: list[int], counts: list[int]) -> Any:
    """The products of one pool, for `ExpertsLayout.compute`."""

    def product(name: str, x: Any) -> torch.Tensor:
        weight = slots.layout.weight(name)
        stored = slots.stored(name, precision)
        if precision == "original":
            ends = torch.tensor(counts, device=stored.device).cumsum(0).to(torch.int32)
            stack = stored.transpose(-2, -1) if weight.out_axis == -2 else stored
            y = torch._grouped_mm(x, stack, offs=ends)
        else:
            y = torch.cat(list(_slot_by_slot(slots, name, precision, counts, x)))
        if weight.bias is not None:
            repeats = torch.tensor(counts, device=y.device)
            y = y + slots.stored(weight.bias, "original")[members].repeat_interleave(repeats, dim=0)
        return y

    return product


def _slot_by_slot(slots: Slots, name: str, precision: str, counts: list[int], x: Any) -> Any:
    """The rows of each slot of a pool in low precision, in order."""
    weight, form = slots.layout.weight(name), get_format(precision)
    stored = {
        part.suffix: slots.stored(name, precision, part.suffix)
        for part in form.parts(weight.shape, weight.out_axis, weight.dtype)
    }
    if precision == "int8" and not isinstance(x, _Quantized):
        x = _Quantized(*quantize_rows(x))
    begin = 0
    for place, count in enumerate(counts):
        if not count:
            continue
        rows = slice(begin, begin + count)
        begin += count
        if precision == "int8":
            seen = _Quantized(x.q[rows], x.scale[rows])
            yield int8_linear(seen, stored[""][place], stored["_scale"][place], weight.out_axis)
        else:
            yield form.linear(x[rows], {suffix: part[place] for suffix, part in stored.items()}, weight.out_axis)
