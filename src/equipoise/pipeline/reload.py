"""Does a saved checkpoint give what the model in memory gave? Asked in a fresh process.

The process knows only the directory: it imports equipoise, loads with plain `from_pretrained`, runs one batch and
prints the largest absolute difference of the logits.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from equipoise.evaluation.data import Batch


def logits_of(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of one batch, on the CPU."""
    with torch.inference_mode():
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
        return model(**inputs, use_cache=False).logits.cpu()


def reload_difference(directory: Path, batch: Batch, logits: torch.Tensor, threads: int) -> float:
    """Largest absolute difference between `logits` and those of the checkpoint loaded in a fresh process.

    Raises:
        RuntimeError: the fresh process failed; its last lines are in the message.
    """
    with tempfile.TemporaryDirectory() as scratch:
        expected = Path(scratch) / "expected.safetensors"
        tensors = {name: tensor.contiguous() for name, tensor in batch.items() if name != "labels"}
        save_file({**tensors, "expected_logits": logits.contiguous()}, expected)
        command = [sys.executable, "-m", "equipoise.pipeline.reload", str(directory), str(expected), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the saved checkpoint does not load in a fresh process:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def _main(directory: str, expected: str, threads: str) -> None:
    # The same number of threads: a sum may be split otherwise and round otherwise.
    torch.set_num_threads(int(threads))
    from equipoise.models.loading import load_model

    tensors = load_file(expected)
    reference = tensors.pop("expected_logits")
    logits = logits_of(load_model(directory, tokenizer=False).model, tensors)
    print(float((logits.float() - reference.float()).abs().max()))


if __name__ == "__main__":
    _main(*sys.argv[1:])
