"""State of a training run in its work directory: one checkpoint, whole or not at all, and a log."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from equipoise.files.atomic import atomic_file


def save(work: Path, model: Any, optimizer: torch.optim.AdamW, step: int, seconds: float) -> None:
    """The checkpoint: weights and both moments, whole or not at all."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach().cpu()
        state = optimizer.state[parameter]
        if state:  # an expert that never got a token has none
            tensors[f"first.{name}"], tensors[f"second.{name}"] = state["exp_avg"].cpu(), state["exp_avg_sq"].cpu()
    with atomic_file(work / "checkpoint.safetensors") as partial:
        save_file(tensors, partial, metadata={"step": str(step), "seconds": str(seconds)})
    print(f"checkpoint at step {step}", file=sys.stderr, flush=True)


def restore(work: Path, model: Any, optimizer: torch.optim.AdamW) -> tuple[int, float]:
    """Read the checkpoint back, if there is one: steps done and seconds used.

    A checkpoint has no device: moments and steps go where the parameters are, which the fused AdamW asks for.
    """
    path = work / "checkpoint.safetensors"
    if not path.exists():
        return 0, 0.0
    with safe_open(path, "pt") as file, torch.no_grad():
        step, seconds = int(file.metadata()["step"]), float(file.metadata()["seconds"])
        names = set(file.keys())
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"weight.{name}"))
            if f"first.{name}" in names:
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(step), device=parameter.device),
                    "exp_avg": file.get_tensor(f"first.{name}").to(parameter.device),
                    "exp_avg_sq": file.get_tensor(f"second.{name}").to(parameter.device),
                }
    return step, seconds


def note(work: Path, entry: dict[str, Any]) -> None:
    """One line of the log, also on stderr."""
    with (work / "log.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
    print(json.dumps(entry), file=sys.stderr, flush=True)
