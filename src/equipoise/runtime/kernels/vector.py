"""Products on plain weights with float32 vector instructions: float32 models, and CPUs without better for bfloat16.

Without matrix instructions torch's own bfloat16 products run at an eighth of the float32 rate (AVX2). Weights stay as
they are stored (`dots`), so memory is that of the plan, and each product of a pool is one call, shared out over torch's
threads.

    original            tokens widened to float32, rounded at the end (many rows in float32: torch's own product)
    int8                tokens quantized once; integers summed exactly in float32, then the scales as `formats.Int8` has
                        them
    int8_weight_only    tokens widened; the channel's scale after the sum, rounded once
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from equipoise.models.layout import Weight
from equipoise.runtime.kernels import dots, few_rows, rows
from equipoise.runtime.kernels.packed import PackedWeight
from equipoise.runtime.kernels.sorted_rows import Digits, Products, Segment, sorted_forward

if TYPE_CHECKING:
    from equipoise.runtime.experts import Slots

SHARED_FROM = 1 << 22
"""Multiplications from which a product is shared out over threads: below, handing over costs more."""
MATRIX_FROM = 64
"""Rows a slot from which torch's float32 product is as fast: below it is bound by the weights, and waits more."""
_NONE = np.empty(0, np.float32)


class PlainProducts(Products):
    """One call for all slots of a group."""

    def __init__(self, slots: Slots, precision: str, members: list[int], segments: list[Segment]) -> None:
        super().__init__(slots, precision, members, segments)
        table = np.array([(s.place, s.begin, s.count) for s in segments], dtype=np.int64)
        self._where = tuple(np.ascontiguousarray(column) for column in table.T)

    @staticmethod
    def prepared(hidden: torch.Tensor, precision: str) -> torch.Tensor | Digits:
        """Digits for W8A8."""
        return Digits.of(hidden, 1) if precision == "int8" else hidden

    def product(self, weight: Weight, x: torch.Tensor | Digits) -> torch.Tensor:
        """[rows, out] of the group's rows [rows, in], in the dtype of the batch."""
        dtype = self.slots.layout.dtype
        if isinstance(x, torch.Tensor) and self._is_matrix_work(x):
            return self._matrix_products(weight, x)
        if self.precision == "int8" and not isinstance(x, Digits):
            x = Digits.of(x, 1)
        y = self._sums(weight, (x.q[0] if isinstance(x, Digits) else x).float().contiguous())
        if self.precision == "original":
            return y.to(dtype)
        scales = self.slots.stored(weight.name, self.precision, "_scale").detach().view(-1, y.shape[1])
        tokens = x.scale.numpy() if isinstance(x, Digits) else _NONE
        out = torch.empty(y.shape, dtype=dtype)
        rows.scale_products(y.numpy(), scales.numpy(), *self._where, tokens, rows.plain(out))
        return out

    def _is_matrix_work(self, x: torch.Tensor) -> bool:
        return x.dtype == torch.float32 and self.precision == "original" and len(x) >= MATRIX_FROM * len(self.segments)

    def _matrix_products(self, weight: Weight, x: torch.Tensor) -> torch.Tensor:
        """float32 rows and weights."""
        stored = self.slots.stored(weight.name, self.precision)
        y = torch.empty((len(x), stored.shape[weight.out_axis]))
        for s in self.segments:
            matrix = stored[s.place].mT if weight.out_axis == -2 else stored[s.place]
            torch.mm(x[s.begin : s.begin + s.count], matrix, out=y[s.begin : s.begin + s.count])
        return y

    def _sums(self, weight: Weight, wide: torch.Tensor) -> torch.Tensor:
        """Products of float32 rows with what is stored, before any scale: float32 [rows, out]."""
        stored = self.slots.stored(weight.name, self.precision).detach()
        channels = stored.shape[weight.out_axis]
        kernel, tile = (dots.by_rows, dots.TILE) if weight.out_axis == -2 else (dots.by_columns, dots.WIDE_TILE)
        y = torch.empty((len(wide), channels))
        arguments = wide.numpy(), rows.plain(stored), *self._where, y.numpy()
        tiles = -(-channels // tile)
        if wide.numel() * channels < SHARED_FROM or torch.get_num_threads() == 1:
            kernel(*arguments, 0, tiles * len(self.segments))
        else:
            _share_out(lambda first, last: kernel(*arguments, first, last), self._where[2].repeat(tiles))
        return y


def _share_out(run: Callable[[int, int], None], rows_of_tile: np.ndarray) -> None:
    """Call `run(first, last)` for ranges that cover all tiles, on as many threads as torch has."""
    total, threads = len(rows_of_tile), torch.get_num_threads()
    # A tile costs its weights and its rows' arithmetic; the weights of few rows are worth about two rows.
    cost = np.cumsum(rows_of_tile + 2)
    ends = np.searchsorted(cost, cost[-1] * np.arange(1, threads) / threads)
    edges = [0, *ends.tolist(), total]
    pending = [
        _pool(os.getpid(), threads - 1).submit(run, first, last) for first, last in pairwise(edges[1:]) if first < last
    ]
    run(0, edges[1])
    for piece in pending:
        piece.result()


@functools.cache
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    """Threads of this process: those of a parent do not survive a fork."""
    return ThreadPoolExecutor(workers, thread_name_prefix="equipoise-products")


def is_ready(slots: Slots, hidden: torch.Tensor) -> bool:
    """Whether this layer and batch can take the path."""
    return hidden.dtype == slots.layout.dtype and hidden.device.type == "cpu" and suits(slots)


def suits(slots: Slots) -> bool:
    """Whether a layer can: bfloat16 or float32, its slots that or int8, in plain tensors, on an x86 processor."""
    return (
        slots.layout.dtype in (torch.bfloat16, torch.float32)
        and suits_processor()
        and all(
            precision in few_rows.PRECISIONS and _is_plain(slots.stored(weight.name, precision), slots.layout.dtype)
            for weight in slots.layout.weights
            if weight.quantizable
            for precision in slots.table.pools
        )
    )


@functools.cache
def suits_processor() -> bool:
    """True on x86, where it was measured. Others (ARM) have fast bfloat16 products of torch's."""
    return platform.machine().lower() in ("x86_64", "amd64")


def _is_plain(stored: torch.Tensor, dtype: torch.dtype) -> bool:
    kind = stored.dtype in (dtype, torch.int8)
    return kind and stored.device.type == "cpu" and not isinstance(stored, PackedWeight)


def forward(slots: Slots, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Routed experts of one layer; see `experts.slots_forward` for arguments and result."""
    if hidden.dtype == torch.bfloat16 and few_rows.suits(slots, index.numel()):
        return few_rows.forward(slots, hidden, index, weights)
    return sorted_forward(slots, hidden, index, weights, PlainProducts)
