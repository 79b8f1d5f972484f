"""Tiny models for the tests of the core rooms: a text, batches, slots at random, and what a fresh process prints."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from equipoise.types import Slot
from tiny import EXPERTS


def write_text(path: Path, documents: int = 40, words: int = 60, seed: int = 0) -> Path:
    """A .txt file of words that the tiny tokenizer knows, some far more frequent than others."""
    draw = np.random.default_rng(seed)
    wanted = np.arange(1, 118) ** -1.0
    numbers = draw.choice(np.arange(3, 120), p=wanted / wanted.sum(), size=(documents, words))
    path.write_text("\n".join(" ".join(f"w{n}" for n in row) for row in numbers), encoding="utf-8")
    return path


def batch(rows: int = 4, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask int64 [rows, length], right padding in the second row."""
    ids = torch.randint(3, 120, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, length // 2 :] = 0
        ids[1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


ANY = ("original", "int8", "int8_weight_only", "float16")
PACKABLE = ANY[:3]
"""What a bfloat16 model holds in packed weights."""


def random_slots(seed: int, precisions: Sequence[str] = ANY) -> list[Slot]:
    """1 to 3 slots an expert of the precisions; shares even or not."""
    draw = np.random.default_rng(seed)
    slots = []
    for expert in range(EXPERTS):
        parts = draw.integers(1, 5, draw.integers(1, 4))
        names = draw.choice(list(precisions), len(parts)).tolist()
        slots += [Slot(expert, name, 0, float(p / parts.sum())) for name, p in zip(names, parts, strict=True)]
    return slots


def fresh_process(code: str, *arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new process, one thread, offline."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "EQUIPOISE_DEVICE": "cpu",
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=environment)
