"""The artifact, one safetensors file: routers in float32, factors as int8 with a float32 scale a row, missing neurons.

    stored   q = round(x / s),  s = max |x| of the row / 127        one row: one factor of one expert
    read     x = s q
    keep     a bit a neuron, eight to a byte

Rounding moves a factor by at most half a step of its row; beside the 4 bits of the dense weights that is nothing,
and it makes room for twice the rank in the same bytes. What was trained, and how long, is in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from equipoise.errors import InputError
from equipoise.files.atomic import atomic_file

LIMIT = 32 * 10**6
"""Bytes it may have in the repository."""


def write(path: Path, weights: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Write `<layer>.router` [E, H], the factors [E R, ...] and, where an expert lacks neurons, `<layer>.keep` [E, I].

    Raises:
        InputError: it would be larger than `LIMIT`.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if name.endswith(".router"):
            tensors[name] = weight.detach().float().contiguous()
            continue
        if name.endswith(".keep"):
            if not bool(weight.all()):
                tensors[name] = torch.from_numpy(np.packbits(weight.cpu().numpy(), axis=1))
            continue
        scale = weight.detach().float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        tensors[name] = (weight.detach().float() / scale).round().to(torch.int8).contiguous()
        tensors[f"{name}_scale"] = scale
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    if size > LIMIT:
        raise InputError(f"{path} would have {size:,} bytes, above {LIMIT:,}: lower the rank")
    with atomic_file(path) as partial:
        save_file(tensors, partial, metadata={"about": json.dumps(about)})


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights by the names they were written under (float32, `keep` bool), and what was said about them.

    Raises:
        InputError: there is no such file.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist: train.py writes it, and the repository has one beside build.py")
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        raw = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    bits = {}
    for name in [name for name in raw if name.endswith(".keep")]:
        width = raw[name.removesuffix("keep") + "out_a"].shape[1]
        bits[name] = torch.from_numpy(np.unpackbits(raw.pop(name).numpy(), axis=1, count=width).astype(bool))
    weights = bits | {
        name: tensor.float() * raw[f"{name}_scale"] if tensor.dtype == torch.int8 else tensor
        for name, tensor in raw.items()
        if not name.endswith("_scale")
    }
    return weights, about
