"""What a format is: the parts a weight is stored as, and the way there and back.

Legend: a weight is [..., out, in] (`out_axis` = -2) or, in families that hold it transposed, [..., in, out]
(`out_axis` = -1). Leading axes stack slots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from equipoise.errors import InputError


@dataclass(frozen=True)
class Part:
    """One stored tensor of a format: `suffix` is appended to the weight's name."""

    suffix: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def largest(weight: torch.Tensor) -> float:
    """Largest magnitude in a weight, without a copy of it.

    Raises:
        InputError: NaN or inf.
    """
    if not weight.numel():
        return 0.0
    low, high = (float(end) for end in weight.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError("a weight is NaN or inf; the checkpoint is damaged")
    return max(-low, high)


class Format(Protocol):
    """A precision. `parts` is enough to count bytes and to build an empty module on the meta device."""

    name: str

    def parts(self, shape: tuple[int, ...], out_axis: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """Stored tensors of a weight of `shape` whose original dtype is `dtype`."""
        ...

    def check(self, weight: torch.Tensor) -> None:
        """Refuse a weight that the format cannot hold.

        Raises:
            InputError: NaN, inf, or beyond the range.
        """
        ...

    def encode(self, weight: torch.Tensor, out_axis: int) -> dict[str, torch.Tensor]:
        """Suffix -> stored tensor."""
        ...

    def decode(self, stored: Mapping[str, torch.Tensor], out_axis: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight the stored tensors stand for, in `dtype`."""
        ...

    def linear(self, x: torch.Tensor, stored: Mapping[str, torch.Tensor], out_axis: int) -> torch.Tensor:
        """The format's own arithmetic, in plain operations: what a kernel must compute.

        Args:
            x: [rows, in].
            stored: of one slot.
            out_axis: of the weight.

        Returns:
            [rows, out] in the dtype of `x`.
        """
        ...


def plain_linear(x: torch.Tensor, weight: torch.Tensor, out_axis: int) -> torch.Tensor:
    """[rows, in] times a weight [out, in] (`out_axis` -2) or [in, out] (-1)."""
    return torch.nn.functional.linear(x, weight) if out_axis == -2 else x @ weight
