"""Products on plain weights with float32 vector instructions: CPUs that have no matrix instructions for bfloat16.

There torch's own bfloat16 products run at an eighth of the float32 rate (AVX2). Weights stay as they are stored
(`dots`), so memory is that of the plan, and each product of a pool is one call, shared out over torch's threads.

    original            tokens widened to float32; rounded to bfloat16 at the end
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
        """bfloat16 [rows, out] of the group's rows [rows, in]."""
        if self.precision == "int8" and not isinstance(x, Digits):
            x = Digits.of(x, 1)
        wide = (x.q[0] if isinstance(x, Digits) else x).float().contiguous()
        stored = self.slots.stored(weight.name, self.precision)
        channels = stored.shape[weight.out_axis]
        kernel, tile = (dots.by_rows, dots.TILE) if weight.out_axis == -2 else (dots.by_columns, dots.WIDE_TILE)
        y = torch.empty((len(wide), channels))
        plain = stored.detach().numpy() if stored.dtype == torch.int8 else rows.bits(stored.detach())
        arguments = wide.numpy(), plain, *self._where, y.numpy()
        tiles = -(-channels // tile)
        if wide.numel() * channels < SHARED_FROM or torch.get_num_threads() == 1:
            kernel(*arguments, 0, tiles * len(self.segments))
        else:
            _share_out(lambda first, last: kernel(*arguments, first, last), self._where[2].repeat(tiles))
        if self.precision == "original":
            return y.to(torch.bfloat16)
        out = torch.empty(y.shape, dtype=torch.bfloat16)
        scales = self.slots.stored(weight.name, self.precision, "_scale").detach().view(-1, channels)
        tokens = x.scale.numpy() if isinstance(x, Digits) else _NONE
        rows.scale_products(y.numpy(), scales.numpy(), *self._where, tokens, rows.bits(out))
        return out


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
    return hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu" and suits(slots)


def suits(slots: Slots) -> bool:
    """Whether the weights of a layer can: 16-bit and int8 slots in plain tensors, on an x86 processor."""
    return suits_processor() and all(
        precision in few_rows.PRECISIONS and _is_plain(slots.stored(weight.name, precision))
        for weight in slots.layout.weights
        if weight.quantizable
        for precision in slots.table.pools
    )


@functools.cache
def suits_processor() -> bool:
    """True on x86, where it was measured. Others (ARM) have fast bfloat16 products of torch's."""
    return platform.machine().lower() in ("x86_64", "amd64")


def _is_plain(stored: torch.Tensor) -> bool:
    kind = stored.dtype in (torch.bfloat16, torch.int8)
    return kind and stored.device.type == "cpu" and not isinstance(stored, PackedWeight)


def forward(slots: Slots, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Routed experts of one layer; see `experts.slots_forward` for arguments and result."""
    if few_rows.suits(slots, index.numel()):
        return few_rows.forward(slots, hidden, index, weights)
    return sorted_forward(slots, hidden, index, weights, PlainProducts)
