"""Where tensors of these scripts live: the processor, or one CUDA device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from equipoise.errors import InputError

NAMES = ("cpu", "cuda")


def device_of(name: str) -> torch.device:
    """The device of an option `--device`.

    Raises:
        InputError: this machine, or this build of torch, has no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but torch sees no CUDA device: leave the option out to use the processor")
    return torch.device(name)


def moved(batch: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of a batch on a device; copies from pinned memory do not wait."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
