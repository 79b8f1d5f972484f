"""Compiled kernels over rows: sorting selections by slot, quantizing tokens, scaling, and the weighted sum over k.

What the matrix products leave to do is bound by memory; as single passes these cost a tenth to a half of the tensor
operations they replace. Numbers are float32, or bfloat16 that comes and goes as its bits (uint16): arithmetic is
float32, rounded to nearest even. Every kernel is serial and gives the same bits on every machine.

Legend: T tokens, k selections a token, n rows (selections), S slots.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import overload

from equipoise.planning.kernels import compiled

_f32, _u32, _u16 = np.float32, np.uint32, np.uint16
ROUND = np.float32(12582912.0)
"""1.5 * 2**23: adding and subtracting it rounds a float32 below 2**22 to the nearest integer, ties to even."""
_TINY = np.float32(np.finfo(np.float32).tiny)


_compiled: Any = partial(compiled, nogil=True, error_model="numpy")
"""Without the GIL: forwards of several threads overlap."""


@_compiled
def from_bits(b):  # type: ignore[no-untyped-def]
    """The float32 of a bfloat16's bits."""
    return _u32(_u32(b) << _u32(16)).view(_f32)


@_compiled
def to_bits(value):  # type: ignore[no-untyped-def]
    """The bits of the bfloat16 nearest to a float32, ties to even."""
    b = _f32(value).view(_u32)
    return _u16(_u32(b + _u32(0x7FFF) + _u32(_u32(b >> _u32(16)) & _u32(1))) >> _u32(16))


def as_float(stored):  # type: ignore[no-untyped-def]
    """The float32 of a stored number: bits of bfloat16 (uint16), float32, or int8."""
    raise NotImplementedError


@overload(as_float, inline="always")
def _value_of(stored):  # type: ignore[no-untyped-def]
    if stored == types.uint16:
        return lambda stored: _u32(_u32(stored) << _u32(16)).view(_f32)
    return lambda stored: _f32(stored)


def rounded(value, like):  # type: ignore[no-untyped-def]
    """A float32 as the array `like` holds it: bits of bfloat16, or itself."""
    raise NotImplementedError


@overload(rounded, inline="always")
def _rounded_as(value, like):  # type: ignore[no-untyped-def]
    if like.dtype == types.uint16:
        return lambda value, like: to_bits(value)
    return lambda value, like: _f32(value)


@_compiled
def row_scale(row):  # type: ignore[no-untyped-def]
    """The largest magnitude of a row of bits over 127, and its inverse; 0 where it is too small or not finite."""
    top = _u16(0)
    for i in range(len(row)):
        # Magnitudes compare as integers do, and NaN is above inf: it cannot hide behind a comparison.
        top = max(top, _u16(row[i] & _u16(0x7FFF)))
    scale = from_bits(top) / _f32(127)
    return scale, _f32(1) / scale if scale >= _TINY else _f32(0)


def bits(x: torch.Tensor) -> np.ndarray:
    """The bits of a bfloat16 tensor on the CPU, uint16, no copy."""
    return x.view(torch.uint16).numpy()


def plain(x: torch.Tensor) -> np.ndarray:
    """A tensor on the CPU as the kernels take it, no copy: bits of bfloat16, others as they are."""
    return bits(x) if x.dtype == torch.bfloat16 else x.numpy()


@_compiled
def sort_by_slot(index, length, offset, pattern, position, tokens, place, counts, k):  # type: ignore[no-untyped-def]
    """Sort selections by the position of their slot (see `SlotTable`), in the order of the batch within a slot.

    Args:
        index: int64 [T*k] experts; E for a dropped selection.
        length: int64 [E + 1] entries of each expert's pattern.
        offset: int64 [E + 1] where the pattern begins.
        pattern: int64, slots.
        position: int64 [S + 1] place of a slot in the order of the pools; S for the sentinel.
        tokens: int64 [T*k], written: the token of each row, kept rows first.
        place: int64 [T*k], written: the row of each selection, -1 when dropped.
        counts: int64 [S + 1], written: rows of each position.
        k: selections a token.
    """
    n = len(index)
    slots = len(counts) - 1
    seen = np.zeros(len(length), np.int64)
    where = np.empty(n, np.int64)
    counts[:] = 0
    for i in range(n):
        e = index[i]
        p = position[pattern[offset[e] + seen[e] % length[e]]]
        seen[e] += 1
        where[i] = p
        counts[p] += 1
    begin = np.empty(slots + 1, np.int64)
    total = 0
    for p in range(slots + 1):
        begin[p] = total
        total += counts[p]
    for i in range(n):
        p = where[i]
        row = begin[p]
        begin[p] += 1
        tokens[row] = i // k
        place[i] = row if p < slots else -1


@_compiled
def count_by_slot(index, length, offset, pattern, real, k, experts, slots):  # type: ignore[no-untyped-def]
    """Add a batch's selections to counters of experts and slots; slots as `sort_by_slot` assigns them.

    Args:
        index: int64 [T*k] experts; E for a dropped selection.
        length: int64 [E + 1] entries of each expert's pattern.
        offset: int64 [E + 1] where the pattern begins.
        pattern: int64, slots.
        real: bool [T], tokens that count; empty: all of them. The others take their turn at the slots all the same.
        k: selections a token.
        experts: int64 [E + 1], added to.
        slots: int64 [S + 1], added to.
    """
    seen = np.zeros(len(length), np.int64)
    for i in range(len(index)):
        e = index[i]
        if len(real) == 0 or real[i // k]:
            experts[e] += 1
            slots[pattern[offset[e] + seen[e] % length[e]]] += 1
        seen[e] += 1


@_compiled
def quantize(x, q, scale):  # type: ignore[no-untyped-def]
    """`formats.quantize_rows` of bfloat16 bits [n, in]: writes q [n, in], int8 or float32, and float32 scale [n]."""
    rows, width = x.shape
    for r in range(rows):
        s, inverse = row_scale(x[r])
        scale[r] = s
        if inverse == _f32(0):
            q[r] = 0
            continue
        for i in range(width):
            v = from_bits(x[r, i]) * inverse
            q[r, i] = np.int32((v + ROUND) - ROUND)


@_compiled
def quantize_two(x, q, scale):  # type: ignore[no-untyped-def]
    """Each bfloat16 in two int8 digits: x = scale * (q[0] + q[1] / 254), to half of scale / 254.

    Args:
        x: [n, in] bits.
        q: int8 [2, n, in], written.
        scale: float32 [n], written.
    """
    rows, width = x.shape
    for r in range(rows):
        s, inverse = row_scale(x[r])
        for i in range(width):
            v = from_bits(x[r, i]) * inverse
            whole = (v + ROUND) - ROUND
            q[0, r, i] = np.int8(np.int32(whole))
            q[1, r, i] = np.int8(np.int32(((v - whole) * _f32(254) + ROUND) - ROUND))
        scale[r] = s


@_compiled
def scale_rows(x, scale):  # type: ignore[no-untyped-def]
    """Rows x [n, out] of bits, in place, times scale [n]."""
    rows, width = x.shape
    for r in range(rows):
        s = scale[r]
        for i in range(width):
            x[r, i] = to_bits(from_bits(x[r, i]) * s)


@_compiled
def scale_row(y, channels, tokens, r, out):  # type: ignore[no-untyped-def]
    """Row r of `scale_products`: y, channels and out are [out]."""
    if len(tokens):
        for i in range(len(channels)):
            out[i] = rounded(as_float(rounded(y[i] * channels[i], out)) * tokens[r], out)
    else:
        for i in range(len(channels)):
            out[i] = rounded(y[i] * channels[i], out)


@_compiled
def scale_products(y, scale, place, begin, count, tokens, out):  # type: ignore[no-untyped-def]
    """Sums of int8 products times their scales.

    Args:
        y: float32 [n, out].
        scale: float32 [slots, out], of the channels.
        place: int64 [N], slot of each segment.
        begin: int64 [N], its first row.
        count: int64 [N], its rows.
        tokens: float32 [n] scales, rounded in between as `formats.Int8.linear` does; empty without.
        out: [n, out], written.
    """
    for s in range(len(place)):
        for r in range(begin[s], begin[s] + count[s]):
            scale_row(y[r], scale[place[s]], tokens, r, out[r])


@_compiled
def merge_two(y, scale, out):  # type: ignore[no-untyped-def]
    """Products of two digits, float32 y [2n, out], to bits out [n, out]: scale * (y[r] + y[n + r] / 254)."""
    rows, width = out.shape
    for r in range(rows):
        s = scale[r]
        for i in range(width):
            out[r, i] = to_bits((y[r, i] + y[rows + r, i] * _f32(1 / 254)) * s)


@_compiled
def combine(y, weights, place, out):  # type: ignore[no-untyped-def]
    """out[t] = sum_j weights[t, j] * y[place[t, j]], in the order of j, rounded once.

    Args:
        y: [n, H].
        weights: float32 [T, k].
        place: int64 [T*k]; -1 for a dropped selection.
        out: [T, H], written.
    """
    tokens, width = out.shape
    k = weights.shape[1]
    total = np.empty(width, np.float32)
    for t in range(tokens):
        total[:] = _f32(0)
        for j in range(k):
            p = place[t * k + j]
            if p >= 0:
                w = weights[t, j]
                for i in range(width):
                    total[i] += w * as_float(y[p, i])
        for i in range(width):
            out[t, i] = rounded(total[i], out)
