"""The checkpoint's own dtype, and float16 for models held in float32 (R&Q, section 5: Switch Transformers)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from equipoise.errors import InputError
from equipoise.formats.base import Part, largest, plain_linear


class Original:
    """The weight as it is."""

    name = "original"

    def parts(self, shape: tuple[int, ...], out_axis: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """One tensor, unchanged."""
        return (Part("", shape, dtype),)

    def check(self, weight: torch.Tensor) -> None:
        """Any weight will do."""

    def encode(self, weight: torch.Tensor, out_axis: int) -> dict[str, torch.Tensor]:
        """The same tensor."""
        return {"": weight}

    def decode(self, stored: Mapping[str, torch.Tensor], out_axis: int, dtype: torch.dtype) -> torch.Tensor:
        """The same tensor, in `dtype`."""
        return stored[""].to(dtype)

    def linear(self, x: torch.Tensor, stored: Mapping[str, torch.Tensor], out_axis: int) -> torch.Tensor:
        """In the dtype of `x`."""
        return plain_linear(x, self.decode(stored, out_axis, x.dtype), out_axis)


class Float16:
    """Half precision: 2 bytes a weight, relative rounding error at most 2**-11 in its normal range."""

    name = "float16"

    def parts(self, shape: tuple[int, ...], out_axis: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """One float16 tensor."""
        return (Part("", shape, torch.float16),)

    def check(self, weight: torch.Tensor) -> None:
        """Refuse weights beyond the range of float16 (65,504)."""
        size = largest(weight)
        if size > torch.finfo(torch.float16).max:
            raise InputError(f"a weight of magnitude {size:.3g} does not fit float16; use int8")

    def encode(self, weight: torch.Tensor, out_axis: int) -> dict[str, torch.Tensor]:
        """Cast to float16.

        Raises:
            InputError: a weight is beyond the range of float16 (65,504), or NaN.
        """
        self.check(weight)
        return {"": weight.to(torch.float16)}

    def decode(self, stored: Mapping[str, torch.Tensor], out_axis: int, dtype: torch.dtype) -> torch.Tensor:
        """Cast to the compute dtype."""
        return stored[""].to(dtype)

    def linear(self, x: torch.Tensor, stored: Mapping[str, torch.Tensor], out_axis: int) -> torch.Tensor:
        """In the dtype of `x`: the weight alone is rounded."""
        return plain_linear(x, self.decode(stored, out_axis, x.dtype), out_axis)
