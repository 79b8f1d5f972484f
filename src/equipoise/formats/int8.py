"""int8, symmetric, one float32 scale per output channel (as LLM.int8() holds weights, arXiv 2208.07339).

    scale[o] = max_i |W[o, i]| / 127        q[o, i] = round(W[o, i] / scale[o])        W' = q * scale

A channel of zeros, or of numbers below the normal range of float32, has scale 1 (and becomes zero). Rounding error
is at most scale / 2 an element, but for the float32 rounding of the scale itself (2**-24 of the element).

Two formats hold the same tensors and differ in what is multiplied:

    int8              W8A8: each token's activations are rounded to int8 too (one scale a token, max |x| / 127),
                      products are summed exactly in int32: what int8 matrix units do
    int8_weight_only  W8A16: activations keep 16 bits

`benchmarks/runtime` states both errors side by side.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from equipoise.errors import InputError
from equipoise.formats.base import Part, largest, plain_linear


def _in_axis(out_axis: int) -> int:
    return -1 if out_axis == -2 else -2


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations of each token in int8, symmetric.

    Args:
        x: [rows, in].

    Returns:
        int8 [rows, in] and float32 [rows, 1] scales; a row with NaN or inf has a scale that is not finite, so the
        row's results are not either.
    """
    scale = x.abs().amax(-1, keepdim=True).float() / 127 if x.shape[-1] else x.new_zeros((len(x), 1)).float()
    # Below the normal range there are too few bits left to divide by; such a row becomes zero.
    inverse = torch.where(scale >= torch.finfo(torch.float32).tiny, scale.reciprocal(), torch.zeros_like(scale))
    return (x.float() * inverse).nan_to_num_(0.0).round_().clamp_(-127, 127).to(torch.int8), scale


class Int8WeightOnly:
    """1 byte a weight and 4 bytes an output channel; activations keep their precision (W8A16)."""

    name = "int8_weight_only"

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

    def linear(self, x: torch.Tensor, stored: Mapping[str, torch.Tensor], out_axis: int) -> torch.Tensor:
        """The decoded weight in the dtype of `x`."""
        return plain_linear(x, self.decode(stored, out_axis, x.dtype), out_axis)


class Int8(Int8WeightOnly):
    """1 byte a weight and 4 bytes an output channel; activations are rounded to int8 a token (W8A8)."""

    name = "int8"

    def linear(self, x: torch.Tensor, stored: Mapping[str, torch.Tensor], out_axis: int) -> torch.Tensor:
        """Integers multiplied in float32 (sums beyond 2**24 are rounded), then both scales."""
        q, scale = quantize_rows(x)
        y = plain_linear(q.float(), stored[""].float(), out_axis)
        return ((y * stored["_scale"].reshape(1, -1)).to(x.dtype) * scale).to(x.dtype)
