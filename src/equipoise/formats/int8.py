"""int8, symmetric, one float32 scale per output channel (as LLM.int8() holds weights, arXiv 2208.07339).

    scale[o] = max_i |W[o, i]| / 127        q[o, i] = round(W[o, i] / scale[o])        W' = q * scale

A channel of zeros, or of numbers below the normal range of float32, has scale 1 (and becomes zero). Rounding error
is at most scale / 2 an element, but for the float32 rounding of the scale itself (2**-24 of the element).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from equipoise.errors import InputError
from equipoise.formats.base import Part, largest


def _in_axis(out_axis: int) -> int:
    return -1 if out_axis == -2 else -2


class Int8:
    """1 byte a weight and 4 bytes an output channel."""

    name = "int8"

    def parts(self, shape: tuple[int, ...], out_axis: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """The int8 weight and its float32 scales, kept with a 1 on the reduced axis so that they broadcast."""
        scale = list(shape)
        scale[_in_axis(out_axis)] = 1
        return (Part("", shape, torch.int8), Part("_scale", tuple(scale), torch.float32))

    def check(self, weight: torch.Tensor) -> None:
        """Any weight of finite numbers has an int8 form."""
        largest(weight)

    def encode(self, weight: torch.Tensor, out_axis: int) -> dict[str, torch.Tensor]:
        """Round to nearest (ties to even).

        Raises:
            InputError: the weight holds NaN or inf.
        """
        axis = _in_axis(out_axis)
        w = weight.to(torch.float32)
        scale = torch.maximum(w.amax(axis, keepdim=True), -w.amin(axis, keepdim=True)) / 127
        if not bool(torch.isfinite(scale).all()):
            raise InputError("a weight is NaN or inf; the checkpoint is damaged")
        # A scale below the normal range has too few bits left to divide by.
        scale = torch.where(scale >= torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
        # At most one float32 copy of the weight: a checkpoint is converted within the memory of a layer.
        q = w / scale if w is weight else w.div_(scale)
        return {"": q.round_().clamp_(-127, 127).to(torch.int8), "_scale": scale}

    def decode(self, stored: Mapping[str, torch.Tensor], out_axis: int, dtype: torch.dtype) -> torch.Tensor:
        """Q * scale, multiplied in float32 and rounded once to `dtype`."""
        return (stored[""].to(torch.float32) * stored["_scale"]).to(dtype)
