"""Measured, not argued: `apply --out` needs one shard, one layer and a constant, far below the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.initialization import no_init_weights

from equipoise.files import save_plan
from equipoise.types import Slot
from families.families_support import make_plan

CONSTANT = 16 * 2**20
"""Code paged in on first use, headers and buffers of the files."""


def slots(row: int) -> list[Slot]:
    """Every kind: a replica in int8, an expert in int8, two left as they are."""
    return [Slot(0, share=0.5), Slot(0, "int8", share=0.5), Slot(1, "int8"), Slot(2), Slot(3)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_is_one_shard_and_one_layer(tmp_path: Path):
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=4,
        dtype="bfloat16",
    )
    with no_init_weights():
        model = MixtralForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.05, 0.05)
    save_plan(make_plan(model, slots), tmp_path / "plan.json")
    model.save_pretrained(tmp_path / "model", max_shard_size="64MB")
    del model
    script = Path(__file__).with_name("checkpoint_memory.py")
    command = [sys.executable, str(script), *(str(tmp_path / name) for name in ("model", "plan.json", "out"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["model"] > 300 * 2**20
    assert found["shards"] >= 5
    assert found["earlier_peak"] < CONSTANT, "the process had been larger before: its peak says nothing"
    assert found["growth"] <= found["shard"] + found["layer"] + CONSTANT
    assert found["growth"] < 0.4 * found["model"]
