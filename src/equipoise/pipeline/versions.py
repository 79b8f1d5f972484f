"""What made a run: versions and processor, so that a figure can be traced."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy
import torch
import transformers

from equipoise import __version__


def made_with() -> dict[str, str]:
    """Versions of what computes the figures, and the processor's name."""
    return {
        "equipoise": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "cpu": _cpu(),
    }


def _cpu() -> str:
    """Model name of the processor where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {torch.get_num_threads()} threads"
    return platform.processor() or platform.machine()
