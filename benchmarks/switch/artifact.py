"""A trained model in the repository: matrices as int8 with a float32 scale a row, the rest in float32, one file.

    stored   q = round(x / s),  s = max |x| of the row / 127
    read     x = s q

Routers, norms and position biases stay as they are: they are small, and a router's rounding could change a choice.
What was trained, and for how long, is in the file's metadata. What the benchmark calls the original model is what is
read back from this file, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from equipoise.errors import InputError
from equipoise.files.atomic import atomic_file

HERE = Path(__file__).parent
LIMIT = 12 * 10**6
"""Bytes a model may have in the repository."""


def path_of(experts: int) -> Path:
    """The artifact of the model with `experts` experts."""
    return HERE / f"switch{experts}.safetensors"


def is_packed(name: str, weight: torch.Tensor) -> bool:
    """Whether a weight is stored as int8."""
    return weight.ndim == 2 and "router" not in name and "relative_attention_bias" not in name


def write(path: Path, weights: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Write the weights of a model, tied ones once.

    Raises:
        InputError: it would be larger than `LIMIT`.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        value = weight.detach().float()
        if not is_packed(name, value):
            tensors[name] = value.contiguous()
            continue
        scale = value.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        tensors[name] = (value / scale).round().to(torch.int8).contiguous()
        tensors[f"{name}_scale"] = scale
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    if size > LIMIT:
        raise InputError(f"{path} would have {size:,} bytes, above {LIMIT:,}: make the model smaller")
    with atomic_file(path) as partial:
        save_file(tensors, partial, metadata={"about": json.dumps(about)})


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Float32 weights by the names of transformers, and what was said about them.

    Raises:
        InputError: there is no such file.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist: the repository has it for 8 and 16 experts, and train.py writes it")
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        raw = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    weights = {
        name: tensor.float() * raw[f"{name}_scale"] if tensor.dtype == torch.int8 else tensor
        for name, tensor in raw.items()
        if not name.endswith("_scale")
    }
    return weights, about
