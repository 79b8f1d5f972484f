"""One slot after the other, in torch's own products: what the GPU path runs where Triton is missing, and its reference.

    int8               tokens quantized once before dispatch, `_int_mm` (s8 x s8 -> s32), both scales
    everything else    the weight decoded, then a GEMM

One synchronisation a layer: the rows of each slot are read back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch

from equipoise.formats import get_format

_LEAST = 32
"""Rows `_int_mm` is run with at least: cuBLASLt wants more than 16."""
_STEP = 16
"""Sizes are padded to multiples of this: torch asks for 8, and rows of int8 should begin at multiples of 16 bytes."""


@dataclass(frozen=True)
class Quantized:
    """Rows quantized before dispatch: int8 [n, in], float32 [n, 1]."""

    q: torch.Tensor
    scale: torch.Tensor

    def take(self, rows: slice | torch.Tensor) -> Quantized:
        """Some of the rows."""
        return Quantized(self.q[rows], self.scale[rows])


def int8_linear(x: Quantized, weight: torch.Tensor, scale: torch.Tensor, out_axis: int) -> torch.Tensor:
    """bfloat16 [n, out] of int8 rows and one slot's int8 weight, as `formats.Int8.linear` has it."""
    rows, width = x.q.shape
    matrix = weight if out_axis == -2 else weight.t().contiguous()
    pad = (-len(matrix)) % _STEP, (-width) % _STEP
    if any(pad):  # no family has such sizes; tiny models do
        matrix = torch.nn.functional.pad(matrix, (0, pad[1], 0, pad[0]))
    padded = torch.nn.functional.pad(x.q, (0, pad[1], 0, max(_LEAST - rows, -rows % _STEP)))
    y = torch._int_mm(padded, matrix.t())[:rows, : scale.numel()]
    return ((y * scale.reshape(1, -1)).to(torch.bfloat16) * x.scale).to(torch.bfloat16)


def linear(
    x: torch.Tensor | Quantized,
    stored: Mapping[str, torch.Tensor],
    precision: str,
    out_axis: int,
    bounds: list[int],
    out: torch.Tensor,
) -> None:
    """The product of one pool with its rows, into `out`; rows of other pools stay as they are.

    Args:
        x: bfloat16 [R, in], or quantized for int8.
        stored: tensors of the pool by suffix, [slots, ...].
        precision: of the pool.
        out_axis: of the weight.
        bounds: where the rows of the first slot begin, then where those of each slot end.
        out: bfloat16 [R, out].
    """
    for place, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            continue
        rows = slice(begin, end)
        if isinstance(x, Quantized):
            out[rows] = int8_linear(x.take(rows), stored[""][place], stored["_scale"][place], out_axis)
        else:
            one = {suffix: part[place] for suffix, part in stored.items()}
            out[rows] = get_format(precision).linear(x[rows], one, out_axis)
