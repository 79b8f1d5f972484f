"""The forward of a balanced layer on CPU: packed weights, rows sorted by slot once, tokens quantized once.

    rows sorted by (precision, slot) -> for each precision, in groups of slots that stay in the cache:
        up:    y = x W^T      int8: int32 sums of oneDNN's s8 GEMM, times the scales of channel and token
        gate:  the family's own, on all rows of the group at once
        down:  as up
    -> y[t] = sum_j w[t, j] * row(t, j), in one pass

Row counts are rounded up to a small set of sizes (`bucket`), because oneDNN compiles a kernel for every new one (1 to
3 ms) and falls to a reference kernel below 16 rows of small int8 products; the rows of the padding are those of the
next slots, or zeros, and their results are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from equipoise.runtime.kernels import rows
from equipoise.runtime.kernels.packed import PackedWeight

if TYPE_CHECKING:
    from equipoise.runtime.experts import Slots

GROUP_BYTES = 4 << 20
"""What the widest rows of one group of slots may take: about twice a second-level cache."""
_LEAST = 16
_ONEDNN: Any = torch.ops.onednn
_MKLDNN: Any = torch.ops.mkldnn
_zeros: dict[int, torch.Tensor] = {}


def bucket(count: int) -> int:
    """Rows a product of `count` rows is run with: 16, 32, ... and at most an eighth more beyond 128."""
    step = max(_LEAST, 1 << max(0, (count - 1).bit_length() - 4))
    return -(-count // step) * step


@dataclass(frozen=True)
class Segment:
    """Rows of one slot within a group: `begin` to `begin + count`; `place` of the slot in its pool."""

    place: int
    begin: int
    count: int


def _window(x: torch.Tensor, begin: int, count: int, size: int) -> torch.Tensor:
    """`size` rows from `begin`, of which `count` matter: a view, or a copy with zeros where x ends before."""
    if begin + size <= len(x):
        return x[begin : begin + size]
    padded = x.new_zeros((size, x.shape[1]))
    padded[:count] = x[begin : begin + count]
    return padded


@dataclass(frozen=True)
class Digits:
    """Tokens quantized before dispatch: int8 [d, n, in] and float32 [n]; d is 1 (W8A8) or 2 (W8A16)."""

    q: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def of(x: torch.Tensor, digits: int) -> Digits:
        """Quantize the rows of a bfloat16 tensor."""
        x = x.contiguous()
        q = torch.empty((digits, *x.shape), dtype=torch.int8)
        scale = torch.empty(len(x))
        if digits == 1:
            rows.quantize(rows.bits(x), q[0].numpy(), scale.numpy())
        else:
            rows.quantize_two(rows.bits(x), q.numpy(), scale.numpy())
        return Digits(q, scale)

    def take(self, tokens: torch.Tensor) -> Digits:
        """The rows of some tokens."""
        return Digits(self.q.index_select(1, tokens), self.scale.index_select(0, tokens))


class _Group:
    """The products of one group of slots of one precision; `linear` is what the layout computes with."""

    def __init__(self, slots: Slots, precision: str, members: list[int], segments: list[Segment], total: int) -> None:
        self.slots, self.precision, self.members = slots, precision, members
        self.segments, self.total = segments, total

    def linear(self, name: str, x: Any) -> torch.Tensor:
        """[rows, out] of [rows, in], or of `Digits` where the tokens are quantized already; the bias included."""
        weight = self.slots.layout.weight(name)
        stored: Any = self.slots.stored(name, self.precision)
        if self.precision == "original":
            y = self._sixteen_bit(stored.packs, x)
        else:
            digits = x if isinstance(x, Digits) else Digits.of(x, 1 if self.precision == "int8" else 2)
            scales = self.slots.stored(name, self.precision, "_scale")
            y = self._int8(stored.packs, scales, digits)
        if weight.bias is not None:
            biases = self.slots.stored(weight.bias, "original")
            for s in self.segments:
                y[s.begin : s.begin + s.count] += biases[self.members[s.place]]
        return y

    def _joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _sixteen_bit(self, packs: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        parts = []
        for s in self.segments:
            size = s.count if s.count <= 8 else bucket(s.count)
            seen = _window(x, s.begin, s.count, size)
            parts.append(_MKLDNN._linear_pointwise(seen, packs[s.place], None, "none", [], "")[: s.count])
        return self._joined(parts)

    def _int8(self, packs: list[torch.Tensor], scales: torch.Tensor, x: Digits) -> torch.Tensor:
        if len(x.q) == 2:
            return self._two_digits(packs, scales, x)
        parts = [_s8(_window(x.q[0], s.begin, s.count, bucket(s.count)), packs[s.place], scales[s.place],
                     torch.bfloat16)[: s.count] for s in self.segments]  # fmt: skip
        y = self._joined(parts)
        rows.scale_rows(rows.bits(y), x.scale.numpy())
        return y

    def _two_digits(self, packs: list[torch.Tensor], scales: torch.Tensor, x: Digits) -> torch.Tensor:
        parts = []
        for s in self.segments:
            end = s.begin + s.count
            both = x.q[:, s.begin : end].reshape(2 * s.count, -1)
            size = bucket(2 * s.count)
            y = _s8(_window(both, 0, 2 * s.count, size), packs[s.place], scales[s.place], torch.float32)
            out = torch.empty((s.count, y.shape[1]), dtype=torch.bfloat16)
            rows.merge_two(y.numpy(), x.scale[s.begin : end].numpy(), rows.bits(out))
            parts.append(out)
        return self._joined(parts)


def _s8(x: torch.Tensor, pack: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int8 [rows, in] times a packed int8 weight, times the channels' scales."""
    width = pack.shape[1]
    if width not in _zeros:
        _zeros[width] = torch.zeros(width, dtype=torch.int32)
    return _ONEDNN.qlinear_pointwise(  # type: ignore[no-any-return]
        x, 1.0, 0, pack, scale.reshape(-1), _zeros[width], None, 1.0, 0, dtype, "none", [], ""
    )


def is_ready(slots: Slots, hidden: torch.Tensor) -> bool:
    """Whether this layer and batch can take the packed path."""
    return (
        hidden.dtype == torch.bfloat16
        and hidden.device.type == "cpu"
        and all(
            isinstance(slots.stored(weight.name, precision), PackedWeight)
            for weight in slots.layout.weights
            if weight.quantizable
            for precision in slots.table.pools
        )
    )


def forward(slots: Slots, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Routed experts of one layer; see `experts.slots_forward` for arguments and result."""
    tokens, place, counts = slots.table.sort(index)
    y = torch.empty((sum(counts), hidden.shape[1]), dtype=hidden.dtype)
    widest = 2 * max(max(weight.shape) for weight in slots.layout.weights)
    limit = max(1, GROUP_BYTES // widest)
    done = first = 0
    for precision, members in slots.table.pools.items():
        pool = counts[first : first + len(members)]
        first += len(members)
        digits = None
        if precision != "original" and any(pool):
            digits = Digits.of(hidden, 1 if precision == "int8" else 2)
        for segments, total in _groups(pool, limit):
            chosen = tokens[done : done + total]
            x: Any = hidden.index_select(0, chosen) if digits is None else digits.take(chosen)
            group = _Group(slots, precision, members, segments, total)
            result, _ = slots.layout.compute(x, group.linear)
            y[done : done + total] = result
            done += total
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    rows.combine(rows.bits(y), weights.float().contiguous().numpy(), place, rows.bits(out))
    return out


def _groups(counts: list[int], limit: int) -> list[tuple[list[Segment], int]]:
    """Slots with rows, in order, in groups of about `limit` rows: (segments, rows of the group)."""
    groups: list[tuple[list[Segment], int]] = []
    segments: list[Segment] = []
    total = 0
    for where, count in enumerate(counts):
        if count:
            if segments and total + count > limit:
                groups.append((segments, total))
                segments, total = [], 0
            segments.append(Segment(where, total, count))
            total += count
    if segments:
        groups.append((segments, total))
    return groups
