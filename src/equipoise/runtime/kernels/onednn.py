"""Products on packed weights: oneDNN's prepacked bf16 and s8 GEMMs, on CPUs with matrix instructions for them.

    int8    int32 sums of the s8 GEMM, times the scales of channel and token; W8A16 is two int8 digits a token

Row counts are rounded up to a small set of sizes (`bucket`), because oneDNN compiles a kernel for every new one (1 to
3 ms) and falls to a reference kernel below 16 rows of small int8 products; the rows of the padding are those of the
next slots, or zeros, and their results are dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from equipoise.models.layout import Weight
from equipoise.runtime.kernels import rows
from equipoise.runtime.kernels.packed import PackedWeight
from equipoise.runtime.kernels.sorted_rows import Digits, Products, sorted_forward

if TYPE_CHECKING:
    from equipoise.runtime.experts import Slots

_LEAST = 16
_ONEDNN: Any = torch.ops.onednn
_MKLDNN: Any = torch.ops.mkldnn
_zeros: dict[int, torch.Tensor] = {}


def bucket(count: int) -> int:
    """Rows a product of `count` rows is run with: 16, 32, ... and at most an eighth more beyond 128."""
    step = max(_LEAST, 1 << max(0, (count - 1).bit_length() - 4))
    return -(-count // step) * step


def _window(x: torch.Tensor, begin: int, count: int, size: int) -> torch.Tensor:
    """`size` rows from `begin`, of which `count` matter: a view, or a copy with zeros where x ends before."""
    if begin + size <= len(x):
        return x[begin : begin + size]
    padded = x.new_zeros((size, x.shape[1]))
    padded[:count] = x[begin : begin + count]
    return padded


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class PackedProducts(Products):
    """One product a slot."""

    @staticmethod
    def prepared(hidden: torch.Tensor, precision: str) -> torch.Tensor | Digits:
        """Digits for int8 weights."""
        return hidden if precision == "original" else Digits.of(hidden, 1 if precision == "int8" else 2)

    def product(self, weight: Weight, x: torch.Tensor | Digits) -> torch.Tensor:
        """bfloat16 [rows, out] of the group's rows [rows, in]."""
        stored: Any = self.slots.stored(weight.name, self.precision)
        if self.precision == "original":
            return self._sixteen_bit(stored.packs, x)  # type: ignore[arg-type]
        digits = x if isinstance(x, Digits) else Digits.of(x, 1 if self.precision == "int8" else 2)
        scales = self.slots.stored(weight.name, self.precision, "_scale")
        return self._int8(stored.packs, scales, digits)

    def _sixteen_bit(self, packs: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        parts = []
        for s in self.segments:
            size = s.count if s.count <= 8 else bucket(s.count)
            seen = _window(x, s.begin, s.count, size)
            parts.append(_MKLDNN._linear_pointwise(seen, packs[s.place], None, "none", [], "")[: s.count])
        return _joined(parts)

    def _int8(self, packs: list[torch.Tensor], scales: torch.Tensor, x: Digits) -> torch.Tensor:
        if len(x.q) == 2:
            return self._two_digits(packs, scales, x)
        parts = [_s8(_window(x.q[0], s.begin, s.count, bucket(s.count)), packs[s.place], scales[s.place],
                     torch.bfloat16)[: s.count] for s in self.segments]  # fmt: skip
        y = _joined(parts)
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
        return _joined(parts)


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
    return sorted_forward(slots, hidden, index, weights, PackedProducts)
