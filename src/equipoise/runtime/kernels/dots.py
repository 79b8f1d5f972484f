"""Compiled products of float32 rows with 16-bit or int8 weights, for CPUs without matrix instructions for either.

A weight is read once, as it is stored, and widened in registers: few rows cost the weight's bytes, and many rows run
at the rate of a float32 GEMM (four rows by two channels are summed at a time, channels in tiles that stay in the
cache over all rows of a slot). Sums may be taken in any order, as in any GEMM; integers are summed exactly while
they stay below 2**24.

One call computes all slots of a pool: work is counted in tiles, slot by slot, so that threads can share it out.

Legend: n slots, R rows, N segments (slots that have rows).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from equipoise.planning.kernels import compiled
from equipoise.runtime.kernels.rows import as_float

_f32 = np.float32

TILE = 64
"""Channels of a tile, for weights [out, in]."""
WIDE_TILE = 512
"""Channels of a tile, for weights [in, out]."""

_compiled: Any = partial(compiled, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


@_compiled
def _one(x, w, y):  # type: ignore[no-untyped-def]
    for o in range(len(w)):
        wa = w[o]
        a = _f32(0)
        for i in range(len(x)):
            a += x[i] * as_float(wa[i])
        y[o] = a


@_compiled
def _two(x0, x1, w, y0, y1):  # type: ignore[no-untyped-def]
    for o in range(len(w)):
        wa = w[o]
        a0, a1 = _f32(0), _f32(0)
        for i in range(len(x0)):
            p = as_float(wa[i])
            a0 += x0[i] * p
            a1 += x1[i] * p
        y0[o], y1[o] = a0, a1


@_compiled
def _four(x0, x1, x2, x3, w, y0, y1, y2, y3):  # type: ignore[no-untyped-def]
    even = len(w) // 2 * 2
    for o in range(0, even, 2):
        wa, wb = w[o], w[o + 1]
        a0, a1, a2, a3 = _f32(0), _f32(0), _f32(0), _f32(0)
        b0, b1, b2, b3 = _f32(0), _f32(0), _f32(0), _f32(0)
        for i in range(len(x0)):
            p, q = as_float(wa[i]), as_float(wb[i])
            a0 += x0[i] * p
            a1 += x1[i] * p
            a2 += x2[i] * p
            a3 += x3[i] * p
            b0 += x0[i] * q
            b1 += x1[i] * q
            b2 += x2[i] * q
            b3 += x3[i] * q
        y0[o], y1[o], y2[o], y3[o] = a0, a1, a2, a3
        y0[o + 1], y1[o + 1], y2[o + 1], y3[o + 1] = b0, b1, b2, b3
    if even < len(w):
        _two(x0, x1, w[even:], y0[even:], y1[even:])
        _two(x2, x3, w[even:], y2[even:], y3[even:])


@_compiled
def products(x, w, y):  # type: ignore[no-untyped-def]
    """Rows x [n, in] times w [O, in] into y [n, O]."""
    n = len(x)
    r = 0
    while n - r >= 3:
        # Of three rows the last is computed twice.
        s = min(r + 3, n - 1)
        _four(x[r], x[r + 1], x[r + 2], x[s], w, y[r], y[r + 1], y[r + 2], y[s])
        r += 4
    if n - r == 2:
        _two(x[r], x[r + 1], w, y[r], y[r + 1])
    elif n - r == 1:
        _one(x[r], w, y[r])


@_compiled
def _columns(x, w, y):  # type: ignore[no-untyped-def]
    """Rows x [n, in] times w [in, O] into y [n, O]: channels side by side, four inputs at a time."""
    n, width = x.shape
    whole = width // 4 * 4
    y[:] = _f32(0)
    for i in range(0, whole, 4):
        w0, w1, w2, w3 = w[i], w[i + 1], w[i + 2], w[i + 3]
        for r in range(n):
            c0, c1, c2, c3 = x[r, i], x[r, i + 1], x[r, i + 2], x[r, i + 3]
            row = y[r]
            for o in range(len(row)):
                row[o] += (c0 * as_float(w0[o]) + c1 * as_float(w1[o])) + (c2 * as_float(w2[o]) + c3 * as_float(w3[o]))
    for i in range(whole, width):
        for r in range(n):
            for o in range(y.shape[1]):
                y[r, o] += x[r, i] * as_float(w[i, o])


@_compiled
def by_rows(x, w, place, begin, count, y, first, last):  # type: ignore[no-untyped-def]
    """Products of each segment's rows with its slot's weight [out, in]; tiles `first` to `last` of them.

    Args:
        x: float32 [R, in].
        w: [n, out, in], int8 or bits of bfloat16 (uint16).
        place: int64 [N], slot of each segment.
        begin: int64 [N], its first row.
        count: int64 [N], its rows.
        y: float32 [R, out], written.
        first: tile, counted through the segments, `TILE` channels each.
        last: the tile after the last.
    """
    out = w.shape[1]
    tiles = (out + TILE - 1) // TILE
    for task in range(first, last):
        s, o = task // tiles, task % tiles * TILE
        rows = slice(begin[s], begin[s] + count[s])
        products(x[rows], w[place[s], o : o + TILE], y[rows, o : o + TILE])


@_compiled
def by_columns(x, w, place, begin, count, y, first, last):  # type: ignore[no-untyped-def]
    """As `by_rows`, for weights [n, in, out] and tiles of `WIDE_TILE` channels."""
    out = w.shape[2]
    tiles = (out + WIDE_TILE - 1) // WIDE_TILE
    for task in range(first, last):
        s, o = task // tiles, task % tiles * WIDE_TILE
        rows = slice(begin[s], begin[s] + count[s])
        _columns(x[rows], w[place[s], :, o : o + WIDE_TILE], y[rows, o : o + WIDE_TILE])
