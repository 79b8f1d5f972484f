"""The forward of a balanced layer on a CPU: rows sorted by slot once, products by precision and in groups.

    rows sorted by (precision, slot) -> for each precision, in groups of slots that stay in the cache:
        up:    y = x W^T      as the processor does it best (`onednn`, `vector`)
        gate:  the family's own, on all rows of the group at once
        down:  as up
    -> y[t] = sum_j w[t, j] * row(t, j), in one pass

H hidden, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from equipoise.formats import quantize_rows
from equipoise.models.layout import Weight
from equipoise.runtime.kernels import rows

if TYPE_CHECKING:
    from equipoise.runtime.experts import Slots

GROUP_BYTES = 4 << 20
"""What the widest rows of one group of slots may take: about twice a second-level cache."""


@dataclass(frozen=True)
class Segment:
    """Rows of one slot within a group: `begin` to `begin + count`; `place` of the slot in its pool."""

    place: int
    begin: int
    count: int


@dataclass(frozen=True)
class Digits:
    """Tokens quantized before dispatch: int8 [d, n, in] and float32 [n]; d is 1 (W8A8) or 2 (W8A16)."""

    q: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def of(x: torch.Tensor, digits: int) -> Digits:
        """Quantize the rows of a tensor: bfloat16, or with one digit float32."""
        x = x.contiguous()
        if x.dtype == torch.float32:
            whole, scales = quantize_rows(x)
            return Digits(whole[None], scales.view(-1))
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


class Products(ABC):
    """The products of one group of slots of one precision; `linear` is what the layout computes with."""

    def __init__(self, slots: Slots, precision: str, members: list[int], segments: list[Segment]) -> None:
        self.slots, self.precision, self.members, self.segments = slots, precision, members, segments

    @staticmethod
    @abstractmethod
    def prepared(hidden: torch.Tensor, precision: str) -> torch.Tensor | Digits:
        """The tokens [T, H] as products of a precision want them: quantized once, before they are dispatched."""

    @abstractmethod
    def product(self, weight: Weight, x: torch.Tensor | Digits) -> torch.Tensor:
        """[rows, out] of the group's rows [rows, in], in the dtype of the batch."""

    def linear(self, name: str, x: torch.Tensor | Digits) -> torch.Tensor:
        """[rows, out] of [rows, in], the bias included."""
        weight = self.slots.layout.weight(name)
        y = self.product(weight, x)
        if weight.bias is not None:
            biases = self.slots.stored(weight.bias, "original")
            for s in self.segments:
                y[s.begin : s.begin + s.count] += biases[self.members[s.place]]
        return y


def sorted_forward(
    slots: Slots, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, products: type[Products]
) -> torch.Tensor:
    """Routed experts of one layer; see `experts.slots_forward` for arguments and result."""
    tokens, place, counts = slots.table.sort(index)
    y = torch.empty((sum(counts), hidden.shape[1]), dtype=hidden.dtype)
    widest = 2 * max(max(weight.shape) for weight in slots.layout.weights)
    limit = max(1, GROUP_BYTES // widest)
    done = first = 0
    for precision, members in slots.table.pools.items():
        pool = counts[first : first + len(members)]
        first += len(members)
        if not any(pool):
            continue
        prepared = products.prepared(hidden, precision)
        for segments, total in groups(pool, limit):
            chosen = tokens[done : done + total]
            x = prepared.take(chosen) if isinstance(prepared, Digits) else prepared.index_select(0, chosen)
            group = products(slots, precision, members, segments)
            # A layout computes with whatever its `linear` takes.
            y[done : done + total] = slots.layout.compute(x, group.linear)[0]  # type: ignore[arg-type]
            done += total
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    rows.combine(rows.plain(y), weights.float().contiguous().numpy(), place, rows.plain(out))
    return out


def groups(counts: list[int], limit: int) -> list[tuple[list[Segment], int]]:
    """Slots with rows, in order, in groups of about `limit` rows: (segments, rows of the group)."""
    found: list[tuple[list[Segment], int]] = []
    segments: list[Segment] = []
    total = 0
    for where, count in enumerate(counts):
        if count:
            if segments and total + count > limit:
                found.append((segments, total))
                segments, total = [], 0
            segments.append(Segment(where, total, count))
            total += count
    if segments:
        found.append((segments, total))
    return found
