"""`apply --out` and run directories killed with SIGKILL at many points: absent, or complete to the byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core_models import batch, random_slots
from equipoise.files import save_plan
from equipoise.models import load_model
from equipoise.runtime import apply
from families.families_support import make_plan
from tiny import FAMILIES, save_tiny

KILLS = {"checkpoint": 30, "forced": 16, "run": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model of several shards, and a plan for it."""
    root = tmp_path_factory.mktemp("killed")
    tiny = FAMILIES["mixtral"]()
    save_plan(make_plan(tiny, random_slots), root / "plan.json")
    return save_tiny(tiny, root / "model", max_shard_size="64KB"), root / "plan.json"


@pytest.mark.parametrize("kind", ["checkpoint", "forced", "run"])
def test_killed_at_many_points(model: tuple[Path, Path], tmp_path: Path, kind: str):
    source, plan = model
    script = Path(__file__).with_name("checkpoint_killed.py")
    command = [sys.executable, str(script), str(source), str(plan), str(tmp_path), kind, str(KILLS[kind])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["swept"] is True
    assert seen["in the middle"] >= 2, f"too few kills met a writer at work: {seen}"
    if kind != "forced":
        assert seen.get("absent", 0) + seen.get("complete", 0) == KILLS[kind]
    else:
        assert seen.get("old", 0) + seen.get("complete", 0) == KILLS[kind]

    written = tmp_path / "work" / "out"
    loaded = load_model(written / "model" if kind == "run" else written, tokenizer=False).model
    memory = load_model(source, tokenizer=False).model
    apply(memory, make_plan(memory, random_slots))
    with torch.no_grad():
        assert torch.equal(loaded(**batch()).logits, memory(**batch()).logits)
