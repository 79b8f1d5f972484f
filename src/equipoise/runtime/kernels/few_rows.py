"""A batch of few rows on plain weights, in one compiled call a layer: a decoding step of small experts.

There the arithmetic takes microseconds, and so does each call: sorting, gathering, quantizing, two products, the gate
and the sum over k are a dozen of them for each precision. Here they are one, on one thread. The numbers are those of
`vector`: the same sums, rounded at the same places.

The activation is a table. A bfloat16 has 65,536 values, so any function of one number is 128 KiB, computed by the
model's own module once, and its bits are the module's whichever it is.

    original            tokens widened to float32; rounded to bfloat16 after each product
    int8                tokens quantized; sums of integers, exact; the scales as `formats.Int8` has them
    int8_weight_only    tokens widened; the channel's scale after the sum

Legend: T tokens, k selections a token, n rows of a slot, H hidden, O channels, S slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from equipoise.models.layout import Elementwise
from equipoise.planning.kernels import compiled
from equipoise.runtime.kernels import dots, rows
from equipoise.runtime.kernels.rows import from_bits, to_bits

if TYPE_CHECKING:
    from equipoise.runtime.experts import Slots
    from equipoise.runtime.slots import SlotTable

PRECISIONS = ("original", "int8", "int8_weight_only")

MOST = 1 << 22
"""Multiplications of a layer up to which its batch is one of few rows."""


@dataclass(frozen=True, eq=False)
class Ready:
    """What `_layer` takes of a layer, gathered once: to look through its tensors takes as long as a token's products.

    Attributes:
        table: of the slots then.
        stored: the layer's tensors by name, and where their data lay. The arrays keep that memory, so nothing else
            comes to lie there, and what is written into it is seen.
        arguments: of `_layer`, those between the batch and `out`.
    """

    table: SlotTable
    stored: tuple[tuple[str, torch.Tensor, int], ...]
    arguments: tuple[Any, ...]


_compiled: Any = partial(compiled, nogil=True, error_model="numpy")
_NONE = np.empty((0, 0, 0), np.float32)
_EMPTY = {
    name: (np.empty((0, 0, 0), kind), _NONE, np.empty((0, 0, 0), kind), _NONE)
    for name, kind in zip(PRECISIONS, (np.uint16, np.int8, np.int8), strict=True)
}
_each: WeakKeyDictionary[Any, float] = WeakKeyDictionary()
_ready: WeakKeyDictionary[Any, Ready] = WeakKeyDictionary()
_tables: WeakKeyDictionary[Any, np.ndarray | None] = WeakKeyDictionary()
_distinct: dict[bytes, np.ndarray] = {}
"""The tables by their content: layers with an activation each share one."""


@_compiled
def _product(x, w, channels, integers, out):  # type: ignore[no-untyped-def]
    """Bits out [n, O] of bits x [n, in] times w [O, in]; `channels` float32 [O] scales, empty for 16-bit weights."""
    n, width = x.shape
    wide = np.empty((n, width), np.float32)
    scale = np.empty(n if integers else 0, np.float32)
    if integers:
        rows.quantize(x, wide, scale)
    else:
        for r in range(n):
            for i in range(width):
                wide[r, i] = from_bits(x[r, i])
    y = np.empty((n, len(w)), np.float32)
    dots.products(wide, w, y)
    for r in range(n):
        if len(channels):
            rows.scale_row(y[r], channels, scale, r, out[r])
        else:
            for o in range(len(w)):
                out[r, o] = to_bits(y[r, o])


@_compiled
def _pool(hidden, tokens, begin, counts, integers, up, up_scale, down, down_scale, act, gated, y):  # type: ignore[no-untyped-def]
    """The rows of one precision's slots, from row `begin` on; `counts` has how many are each slot's."""
    none = np.empty((0, 1), np.float32)[:, 0]
    scaled = len(up_scale) > 0
    for s in range(len(up)):
        n = counts[s]
        if n == 0:
            continue
        x = np.empty((n, hidden.shape[1]), np.uint16)
        for r in range(n):
            x[r] = hidden[tokens[begin + r]]
        first = np.empty((n, up.shape[1]), np.uint16)
        _product(x, up[s], up_scale[s, :, 0] if scaled else none, integers, first)
        width = down.shape[2]
        inner = np.empty((n, width), np.uint16)
        for r in range(n):
            for i in range(width):
                a = act[first[r, i]]
                inner[r, i] = to_bits(from_bits(a) * from_bits(first[r, width + i])) if gated else a
        _product(inner, down[s], down_scale[s, :, 0] if scaled else none, integers, y[begin : begin + n])
        begin += n


@_compiled
def _layer(  # type: ignore[no-untyped-def]
    hidden, index, weights, length, offset, pattern, position, first, original, int8, weight_only, act, gated, out
):
    """All of a layer.

    Args:
        hidden: [T, H] bits.
        index: int64 [T*k].
        weights: float32 [T, k].
        length: with `offset`, `pattern` and `position`, as `rows.sort_by_slot` has them.
        offset: see `length`.
        pattern: see `length`.
        position: see `length`.
        first: place of each precision's first slot in the order of the pools, three of them.
        original: bits of up [n, O, H], no scales, bits of down [n, H, I], no scales.
        int8: up, its scales [n, O, 1], down, its scales [n, H, 1] of the W8A8 slots.
        weight_only: the same of the W8A16 slots.
        act: uint16 [65536].
        gated: whether the first product is the gate and, behind it, what is gated.
        out: [T, H] bits, written.
    """
    n = len(index)
    tokens, place = np.empty(n, np.int64), np.empty(n, np.int64)
    counts = np.empty(len(position), np.int64)
    rows.sort_by_slot(index, length, offset, pattern, position, tokens, place, counts, weights.shape[1])
    begin = np.cumsum(counts) - counts
    y = np.empty((n, hidden.shape[1]), np.uint16)
    a, b, c = first
    _pool(hidden, tokens, begin[a], counts[a:], False, *original, act, gated, y)
    _pool(hidden, tokens, begin[b], counts[b:], True, *int8, act, gated, y)
    _pool(hidden, tokens, begin[c], counts[c:], False, *weight_only, act, gated, y)
    rows.combine(y, weights, place, out)


def suits(slots: Slots, selections: int) -> bool:
    """Whether a batch of so many selections (T k) is one for this path; `vector.suits` says whether the weights are."""
    each = _each.get(slots)
    if each is None:
        each = _each[slots] = _multiplications(slots)
    return selections * each <= MOST


def _multiplications(slots: Slots) -> float:
    """Of one selection; inf where a layer's experts are not made for this path."""
    form = slots.layout.elementwise
    if form is None or any(slots.layout.weight(name).out_axis != -2 for name in (form.up, form.down)):
        return math.inf
    shapes = [slots.layout.weight(name).shape for name in (form.up, form.down)]
    return sum(map(math.prod, shapes)) if table(form) is not None else math.inf


def table(form: Elementwise) -> np.ndarray | None:
    """Bits of the activation at each of the 65,536 bfloat16 values; None for one that is no function of one number."""
    if form.act not in _tables:
        _tables[form.act] = _tabulated(form.act)
    return _tables[form.act]


@torch.no_grad()
def _tabulated(act: Any) -> np.ndarray | None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    found, turned = act(every), act(every.flip(0).view(256, 256)).view(-1).flip(0)
    if found.dtype != torch.bfloat16 or not torch.allclose(found, turned, rtol=0.01, equal_nan=True):
        return None
    values = rows.bits(found)
    return _distinct.setdefault(values.tobytes(), values)


def ready(slots: Slots, hidden: torch.Tensor, selections: int) -> Ready | None:
    """What an earlier batch gathered, for a batch that can take the path; None when something changed since."""
    found = _ready.get(slots)
    if found is None or found.table is not slots.table or hidden.dtype != torch.bfloat16 or not hidden.is_cpu:
        return None
    here = slots.layout.module._parameters
    same = all(here.get(name) is tensor and tensor.data_ptr() == address for name, tensor, address in found.stored)
    return found if same and suits(slots, selections) else None


def forget(slots: Slots) -> None:
    """Let go of a layer's tensors."""
    _ready.pop(slots, None)


def _gathered(slots: Slots) -> Ready:
    form = slots.layout.elementwise
    assert form is not None
    names = {id(tensor): name for name, tensor in slots.layout.module._parameters.items()}
    stored: list[tuple[str, torch.Tensor, int]] = []

    def array(weight: str, precision: str, suffix: str) -> np.ndarray:
        if precision == "original" and suffix:
            return _NONE
        tensor = slots.stored(weight, precision, suffix)
        stored.append((names[id(tensor)], tensor, tensor.data_ptr()))
        return rows.plain(tensor.detach())

    pools = [
        tuple(array(weight, name, suffix) for weight in (form.up, form.down) for suffix in ("", "_scale"))
        if name in slots.table.pools
        else empty
        for name, empty in _EMPTY.items()
    ]
    firsts = tuple(slots.table.firsts.get(name, 0) for name in PRECISIONS)
    return Ready(slots.table, tuple(stored), (*slots.table.arrays, firsts, *pools, table(form), form.gated))


def forward(slots: Slots, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Routed experts of one layer; see `experts.slots_forward` for arguments and result."""
    _ready[slots] = found = _gathered(slots)
    return run(found, hidden, index, weights)


def run(found: Ready, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """As `forward`, on what is gathered."""
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    _layer(
        rows.bits(hidden.contiguous()), index.reshape(-1).numpy(), weights.float().contiguous().numpy(),
        *found.arguments, rows.bits(out),
    )  # fmt: skip
    return out
