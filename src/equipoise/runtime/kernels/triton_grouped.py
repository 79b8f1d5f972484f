"""Triton kernels of the GPU path: dispatch, rounding to int8, one product for all slots of a precision, combine.

    dispatch   expert -> slot -> place among the rows sorted by (precision, slot), for small batches, in one program
    quantize   q[r] = round(x[r] / scale[r]), scale[r] = max |x[r]| / 127, as `formats.quantize_rows`
    linear     y[r] = x[r] W[slot(r)]^T    s8 x s8 -> s32 (W8A8), or 16 bits x decoded weight -> float32
    combine    out[t] = sum_j w[t, j] * y[place(t, j)]

Where a slot's rows begin is read from a device tensor (`ends`), never from the host: a launch has as many programs as
the rows could need at most, and those without rows return at once. So no kernel synchronises, an empty slot costs
nothing, and a layer can be captured in a CUDA graph. Weights are read as they are stored, in either layout.

R rows (selections), S slots, T tokens, k a token selects. Runs on a CPU with TRITON_INTERPRET=1, for tests.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Annotations are not postponed: Triton reads those of its kernels.

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

SMALL = 128
"""Selections up to which one program dispatches the batch: it compares all pairs of them."""

NEAREST = tl.constexpr(12582912.0)
"""1.5 * 2**23: added and taken away again, it rounds a float32 below 2**22 to the nearest integer, ties to even."""


@triton.jit
def _dispatch(
    index, length, offset, pattern, positions, place, tokens, position, ends,
    rows, top_k, slots, R: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, R)
    kept = i < rows
    expert = tl.load(index + i, mask=kept, other=-1).to(tl.int32)
    first = tl.load(offset + expert, mask=kept, other=0).to(tl.int32)
    period = tl.load(length + expert, mask=kept, other=1).to(tl.int32)
    earlier = i[None, :] < i[:, None]
    rank = tl.sum(((expert[None, :] == expert[:, None]) & earlier).to(tl.int32), 1)
    slot = tl.load(pattern + first + rank % period, mask=kept, other=0).to(tl.int32)
    where = tl.load(positions + slot, mask=kept, other=1 << 30).to(tl.int32)
    before = (where[None, :] < where[:, None]) | ((where[None, :] == where[:, None]) & earlier)
    at = tl.sum(before.to(tl.int32), 1)
    tl.store(place + i, at, mask=kept)
    tl.store(tokens + at, i // top_k, mask=kept)
    tl.store(position + at, where, mask=kept)
    s = tl.arange(0, S)
    tl.store(ends + s, tl.sum((where[None, :] <= s[:, None]).to(tl.int32), 1), mask=s < slots)


@triton.jit
def _quantize(x, q, scale, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    damaged = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, width, BLOCK):
        value = tl.load(x + row * stride + begin + column, mask=begin + column < width, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
        damaged = damaged | (value != value).to(tl.int32)
    s = tl.div_rn(tl.max(largest, 0), 127.0)
    s = tl.where(tl.max(damaged, 0) > 0, float("nan"), s)
    usable = s >= 1.1754943508222875e-38  # below the normal range there are too few bits left to divide by
    inverse = tl.where(usable, tl.div_rn(1.0, tl.where(usable, s, 1.0)), 0.0)
    tl.store(scale + row, s)
    for begin in range(0, width, BLOCK):
        inside = begin + column < width
        value = tl.load(x + row * stride + begin + column, mask=inside, other=0).to(tl.float32) * inverse
        value = tl.where(value == value, value, 0.0)
        rounded = (tl.minimum(tl.maximum(value, -127.0), 127.0) + NEAREST) - NEAREST
        tl.store(q + row * width + begin + column, rounded.to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=["first", "slots"])
def _linear(
    x, tokens, x_scale, weight, w_scale, out, ends, first, slots, n, k,
    stride_x, stride_slot, stride_n, stride_k, stride_out,
    S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    INT8: tl.constexpr, SCALED: tl.constexpr, GATHER: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    s = tl.arange(0, S)
    end = tl.load(ends + first + s, mask=s < slots, other=0)
    start = tl.load(ends + first + s - 1, mask=(s < slots) & (first + s > 0), other=0)
    blocks = tl.where(s < slots, (end - start + BM - 1) // BM, 0)
    last = tl.cumsum(blocks, 0)
    slot = tl.sum((last <= block).to(tl.int32), 0)
    if slot < slots:
        mine = s == slot
        begin = tl.sum(tl.where(mine, start + (block - last + blocks) * BM, 0), 0)
        stop = tl.sum(tl.where(mine, end, 0), 0)
        row = begin + tl.arange(0, BM)
        kept = row < stop
        if GATHER:
            source = tl.load(tokens + row, mask=kept, other=0)
        else:
            source = row
        column = tl.program_id(1) * BN + tl.arange(0, BN)
        step = tl.arange(0, BK)
        a_at = x + source.to(tl.int64)[:, None] * stride_x + step[None, :]
        b_at = weight + slot.to(tl.int64) * stride_slot + (column[None, :] * stride_n + step[:, None] * stride_k)
        if INT8:
            total = tl.zeros([BM, BN], tl.int32)
        else:
            total = tl.zeros([BM, BN], tl.float32)
        for at in range(0, k, BK):
            if EVEN_K:
                a = tl.load(a_at, mask=kept[:, None], other=0)
            else:
                a = tl.load(a_at, mask=kept[:, None] & (at + step < k)[None, :], other=0)
            if EVEN_K and EVEN_N:
                b = tl.load(b_at)
            else:
                b = tl.load(b_at, mask=(at + step < k)[:, None] & (column < n)[None, :], other=0)
            if INT8:
                total = tl.dot(a, b, total, out_dtype=tl.int32)
            else:
                total = tl.dot(a, b.to(a.dtype), total)
            a_at += BK
            b_at += BK * stride_k
        y = total.to(tl.float32)
        if SCALED:
            y = y * tl.load(w_scale + slot.to(tl.int64) * n + column, mask=column < n, other=0)[None, :]
        if INT8:  # rounded in between, as `formats.Int8.linear`
            y = y.to(tl.bfloat16).to(tl.float32) * tl.load(x_scale + source, mask=kept, other=0)[:, None]
        at_out = out + row.to(tl.int64)[:, None] * stride_out + column[None, :]
        tl.store(at_out, y.to(tl.bfloat16), mask=kept[:, None] & (column < n)[None, :])


@triton.jit
def _combine(y, weights, place, ends, out, slots, width, stride, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    computed = tl.load(ends + slots - 1)
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(K):
        row = tl.load(place + token * K + j)
        kept = row < computed
        weight = tl.load(weights + token * K + j, mask=kept, other=0).to(tl.float32)
        value = tl.load(y + row.to(tl.int64) * stride + column, mask=kept & (column < width), other=0)
        total += value.to(tl.float32) * weight
    tl.store(out + token * width + column, total.to(tl.bfloat16), mask=column < width)


def _on(x: torch.Tensor) -> Any:
    """Triton launches on the current device, which need not be that of the tensors."""
    there = not x.is_cuda or x.get_device() == torch.cuda.current_device()
    return nullcontext() if there else torch.cuda.device(x.device)


def dispatch(
    index: torch.Tensor,
    length: torch.Tensor,
    offset: torch.Tensor,
    pattern: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows of a small batch, sorted by slot; the same assignment as `SlotTable.assign`.

    Args:
        index: int64 [T, k] experts, at most `SMALL` selections and at least one; E where one was dropped.
        length: int64 [E + 1] of the slot table, as are the others; see `SlotTable.patterns`.
        offset: int64 [E + 1].
        pattern: int64.
        positions: int64 [S + 1], see `SlotTable.positions`.

    Returns:
        place [T*k] of each selection among the rows, tokens [T*k] and position [T*k] of each row, ends [S] of the
        slots in the order of the pools: all int32.
    """
    rows, slots = index.numel(), len(positions) - 1
    place, tokens, position = (torch.empty(rows, dtype=torch.int32, device=index.device) for _ in range(3))
    ends = torch.empty(slots, dtype=torch.int32, device=index.device)
    size = max(16, triton.next_power_of_2(rows))
    with _on(index):
        _dispatch[(1,)](
            index.contiguous(), length, offset, pattern, positions, place, tokens, position, ends,
            rows, index.shape[1], slots, R=size, S=max(16, triton.next_power_of_2(slots)), num_warps=8,
        )  # fmt: skip
    return place, tokens, position, ends


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [n, in] and float32 [n, 1] of 16-bit rows [n, in]; see `formats.quantize_rows`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((len(x), 1), dtype=torch.float32, device=x.device)
    if len(x):
        block = min(2048, triton.next_power_of_2(x.shape[1]))
        with _on(x):
            _quantize[(len(x),)](x, q, scale, x.shape[1], x.stride(0), BLOCK=block, num_warps=4)
    return q, scale


def sizes(rows: int, slots: int, k: int, int8: bool) -> dict[str, int]:
    """Block sizes by the mean rows of a slot: narrow where weights are read once, wide where they are used often."""
    mean = rows / max(slots, 1)
    if mean <= 24:
        block = {"BM": 16, "BN": 64, "BK": 256 if int8 else 128, "num_warps": 4, "num_stages": 4}
    elif mean <= 96:
        block = {"BM": 64, "BN": 128, "BK": 128 if int8 else 64, "num_warps": 4, "num_stages": 4}
    else:
        block = {"BM": 128, "BN": 128, "BK": 128 if int8 else 64, "num_warps": 8, "num_stages": 3}
    step = min(block["BK"], max(32, triton.next_power_of_2(k)))
    while k % step and step > 64:  # a size that divides k needs no mask
        step //= 2
    return block | {"BK": step}


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    ends: torch.Tensor,
    first: int,
    *,
    out_axis: int,
    tokens: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> None:
    """The product of one pool with its rows, into `out`; rows of other pools stay as they are.

    Args:
        x: [R, in] sorted rows, or [T, in] with `tokens`: int8 (with `x_scale`) or bfloat16.
        weight: [slots of the pool, out, in] (`out_axis` -2) or [.., in, out] (-1): int8 or 16 bits.
        out: bfloat16 [R, out].
        ends: int32 [S], end of each slot's rows; the pool's slots are `first`, `first` + 1, ...
        first: see there.
        out_axis: see there.
        tokens: int32 or int64 [R], row of `x` that each row reads.
        x_scale: float32 [R or T, 1].
        scale: float32 [slots of the pool, out, 1] or [.., 1, out], of the weight.
    """
    rows, n = out.shape
    slots, k = len(weight), x.shape[1]
    stride_n, stride_k = (
        (weight.stride(1), weight.stride(2)) if out_axis == -2 else (weight.stride(2), weight.stride(1))
    )
    x = x if x.stride(-1) == 1 else x.contiguous()
    block = sizes(rows, slots, k, x_scale is not None)
    most = min(rows, slots) + rows // block["BM"]
    with _on(x):
        _linear[(most, triton.cdiv(n, block["BN"]))](
            x, x if tokens is None else tokens, x if x_scale is None else x_scale, weight,
            x if scale is None else scale, out, ends, first, slots, n, k,
            x.stride(0), weight.stride(0), stride_n, stride_k, out.stride(0),
            S=max(64, triton.next_power_of_2(slots)), INT8=x_scale is not None, SCALED=scale is not None,
            GATHER=tokens is not None, EVEN_N=n % block["BN"] == 0, EVEN_K=k % block["BK"] == 0, **block,
        )  # fmt: skip


def combine(y: torch.Tensor, weights: torch.Tensor, place: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """bfloat16 [T, H]: rows y [R, H] times weights [T, k], summed in float32; dropped selections add nothing.

    Args:
        y: [R, H]; rows behind the last slot's end are never read.
        weights: [T, k] float.
        place: [T*k] row of each selection.
        ends: int32 [S].
    """
    rows, k = weights.shape
    out = torch.empty((rows, y.shape[1]), dtype=torch.bfloat16, device=y.device)
    block = min(1024, triton.next_power_of_2(y.shape[1]))
    with _on(y):
        _combine[(rows, triton.cdiv(y.shape[1], block))](
            y, weights.contiguous(), place, ends, out, len(ends), y.shape[1], y.stride(0), K=k, BLOCK=block, num_warps=4
        )
    return out
