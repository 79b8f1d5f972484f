"""`apply_checkpoint`: many shards, equal to the model in memory; refusals; a disk that is full."""

from __future__ import annotations

import dataclasses
import errno
import json
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from core_models import batch, fresh_process, random_slots
from equipoise.checkpoint import apply_checkpoint, stream
from equipoise.errors import InputError
from equipoise.files import save_plan
from equipoise.models import load_model
from equipoise.runtime import apply, expert_bytes, plan_of
from equipoise.types import Budget, Plan
from families.families_support import identity_slots, make_plan
from tiny import FAMILIES, save_tiny


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_tiny(FAMILIES["mixtral"](), tmp_path / "model", max_shard_size="20KB")


@pytest.fixture
def plan() -> Plan:
    return make_plan(FAMILIES["mixtral"](), random_slots)


def listing(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "switch_transformers", "granitemoe"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_shards_make_no_difference(family: str, shard: str, tmp_path: Path):
    source = save_tiny(FAMILIES[family](dtype=torch.bfloat16), tmp_path / "model", max_shard_size=shard)
    assert (len(list(source.glob("*.safetensors"))) > 5) == (shard == "20KB")
    memory = load_model(source).model
    plan = make_plan(memory, lambda row: identity_slots(row) if row == 1 else random_slots(row))
    sizes = apply_checkpoint(source, plan, tmp_path / "out")
    apply(memory, plan)
    loaded = load_model(tmp_path / "out").model
    ours, theirs = dict(loaded.named_parameters()), dict(memory.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    inputs = batch() | ({"decoder_input_ids": batch()["input_ids"]} if memory.config.is_encoder_decoder else {})
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, memory(**inputs).logits)
    assert plan_of(loaded) == plan
    in_memory = expert_bytes(memory)
    assert sizes == {layer.name: in_memory[layer.name] for layer in plan.layers if not layer.is_identity}


def test_index_names_every_tensor_once(source: Path, plan: Plan, tmp_path: Path):
    apply_checkpoint(source, plan, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    stored: dict[str, str] = {}
    total = 0
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                assert name not in stored
                stored[name] = file.name
                tensor = tensors.get_tensor(name)
                total += tensor.numel() * tensor.element_size()
    assert index["weight_map"] == stored
    assert index["metadata"]["total_size"] == total
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_two_runs_are_equal_to_the_byte(source: Path, plan: Plan, tmp_path: Path):
    for name in ("a", "b"):
        apply_checkpoint(source, plan, tmp_path / name)
    assert listing(tmp_path / "a") == listing(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def refused(source: Path, plan: Plan, out: Path, message: str, **options: Any) -> None:
    """Refused in one line, and nothing at all has been written."""
    before = listing(source.parent)
    with pytest.raises(InputError) as caught:
        apply_checkpoint(source, plan, out, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert listing(source.parent) == before


def test_refusals_write_nothing(source: Path, plan: Plan, tmp_path: Path):
    out = tmp_path / "out"
    other = dataclasses.replace(plan, model=dataclasses.replace(plan.model, model_type="olmoe"))
    refused(source, other, out, "model_type 'olmoe'")
    refused(source, dataclasses.replace(plan, budget=Budget(9, 9, 9)), out, "over budget")
    refused(tmp_path / "nothing", plan, out, "no such model")
    refused(source, plan, source, "exists already")
    refused(source, plan, source, "would be lost", force=True)
    refused(source, plan, tmp_path, "would be lost", force=True)
    apply_checkpoint(source, plan, out)
    refused(out, plan, tmp_path / "twice", "is balanced already")
    refused(source, plan, out, "exists already")


def test_damaged_sources_write_nothing(source: Path, plan: Plan, tmp_path: Path):
    index = source / "model.safetensors.index.json"
    good = index.read_text(encoding="utf-8")
    files = json.loads(good)["weight_map"]
    expert = next(name for name in files if "experts" in name)
    shard = source / files[expert]
    contents = shard.read_bytes()

    shard.unlink()
    refused(source, plan, tmp_path / "out", "is incomplete")
    shard.write_bytes(contents[: len(contents) // 2])
    refused(source, plan, tmp_path / "out", "damaged")
    shard.write_bytes(contents)

    document = json.loads(good)
    del document["weight_map"][expert]
    index.write_text(json.dumps(document), encoding="utf-8")
    refused(source, plan, tmp_path / "out", "lacks weights")
    for text in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(text, encoding="utf-8")
        refused(source, plan, tmp_path / "out", "index")
    index.unlink()
    refused(source, plan, tmp_path / "out", "no safetensors weights")


def test_a_weight_that_does_not_fit_writes_nothing(source: Path, plan: Plan, tmp_path: Path):
    """A checkpoint with NaN: found in the middle of writing, gone without a trace."""
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if "experts" in name:
                tensors[name][0, 0] = float("nan")
        save_file(tensors, file, {"format": "pt"})
    refused(source, plan, tmp_path / "out", "NaN or inf")


def test_no_room(source: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(source, plan, tmp_path / "deep" / "out", "not enough room")


def test_disk_full_in_the_middle(source: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = 0
    save = stream.save_file

    def full(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(arguments[1]))
        save(*arguments)

    monkeypatch.setattr(stream, "save_file", full)
    before = listing(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        apply_checkpoint(source, plan, tmp_path / "out")
    assert listing(tmp_path) == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    calls = 0
    with pytest.raises(OSError, match="No space left"):
        apply_checkpoint(source, plan, tmp_path / "out", force=True)
    assert listing(tmp_path / "out") == ["old"]


LIMITED = """
import resource, signal, sys
from equipoise.cli.main import run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(run(["apply", *sys.argv[2:]]))
"""


def test_a_file_system_that_really_refuses(source: Path, plan: Plan, tmp_path: Path):
    """A real refusal of the system in the writer of safetensors: one line, and nothing written."""
    assert hasattr(resource, "RLIMIT_FSIZE")
    assert hasattr(signal, "SIGXFSZ")
    save_plan(plan, tmp_path / "plan.json")
    before = listing(tmp_path)
    done = fresh_process(LIMITED, 15_000, source, tmp_path / "plan.json", "--out", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: File too large")
    assert len(done.stderr.splitlines()) == 1
    assert listing(tmp_path) == before
