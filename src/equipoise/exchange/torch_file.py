"""Tensors in `.pt` files, read without running anything in them.

torch is imported inside the functions: the exchange room itself needs numpy only. Reading uses torch's
restricted unpickler (`weights_only=True`), which builds tensors and plain containers and refuses the rest.
"""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.errors import InputError
from equipoise.types import IntArray

_LARGEST_VIEW = 2**24


def load(source: Path | bytes) -> Any:
    """The object in a `.pt` file, on the CPU.

    Raises:
        InputError: the file holds other objects than tensors and plain values, or is damaged.
    """
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(
                io.BytesIO(source) if isinstance(source, bytes) else source, map_location="cpu", weights_only=True
            )
    except OSError as error:
        raise InputError(f"it cannot be read ({error.strerror or error})") from error
    except Exception as error:  # the unpickler of damaged bytes raises nearly every type there is
        beyond = re.search(r"unsupported (global|class|operand)[^\n]{0,80}", str(error), re.IGNORECASE)
        if beyond:
            raise InputError(
                f"it is refused: it holds pickled content beyond plain tensors, which could run code ({beyond[0]})"
            ) from error
        raise InputError(f"it is not a readable .pt file ({type(error).__name__})") from error


def dumps(value: dict[str, IntArray]) -> bytes:
    """The bytes of a `.pt` file with these arrays as int64 tensors."""
    import torch

    # A buffer, not a path: torch writes the file's name into the archive, and the name here is a temporary one.
    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in value.items()}, buffer)
    return buffer.getvalue()


def integers(value: Any, what: str, *ndims: int) -> IntArray:
    """An integer tensor as int64.

    Args:
        value: what the file holds.
        what: its name, for the messages.
        ndims: the numbers of axes that will do.

    Raises:
        InputError: not a dense integer tensor, or of another rank.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        raise InputError(f"{what} is a {type(value).__name__}, a tensor is needed")
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        raise InputError(f"{what} is not a plain tensor ({value.layout}, {value.device})")
    if value.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise InputError(f"{what} has dtype {value.dtype}, integers are needed")
    if value.ndim not in ndims:
        raise InputError(f"{what} has {value.ndim} axes, {' or '.join(map(str, ndims))} are needed")
    # A view with zero strides can claim any size; it is bounded before it is copied.
    if value.numel() > max(_LARGEST_VIEW, value.untyped_storage().nbytes()):
        raise InputError(f"{what} claims {value.numel():,} numbers, more than the file holds")
    return value.detach().numpy().astype(np.int64)
