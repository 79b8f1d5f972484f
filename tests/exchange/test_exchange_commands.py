"""`equipoise export` and `equipoise import` as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exchange_cases import NOTES_LAYER, layer_plan, plan_of
from safetensors.numpy import save_file

from equipoise.cli.main import run
from equipoise.files import load_profile, save_plan, save_profile
from equipoise.types import Profile


def last(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


def statistics(path: Path) -> Path:
    path.mkdir()
    (path / "meta_info.json").write_text('{"num_experts": 4, "num_experts_per_token": 2}')
    save_file({f"{i}_3": np.array([40, 30, 20, 10 * i]) for i in range(4)}, path / "rank0.safetensors")
    return path


@pytest.mark.parametrize(("engine", "name"), [("sglang", "m.json"), ("sglang", "m.pt"), ("trtllm", "m.yaml")])
def test_export_writes_the_file_and_ends_with_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str, name: str
) -> None:
    save_plan(plan_of([layer_plan(3, NOTES_LAYER, 4, "int8")], 2), tmp_path / "plan.json")
    arguments = ["export", str(tmp_path / "plan.json"), "--to", engine, "--out", str(tmp_path / name)]
    assert run(arguments) == 2
    refusal = capsys.readouterr().err
    assert refusal.count("\n") == 1
    assert "layer 3 has 2 of 6 slots in int8" in refusal
    assert not (tmp_path / name).exists()
    assert run([*arguments, "--placement-only", "--ep-size", "2", "--num-hidden-layers", "5"]) == 0
    result = last(capsys)
    assert (tmp_path / name).stat().st_size > 0
    assert (result["slots"], result["redundant"], result["ranks"], result["lost_precisions"]) == (6, 2, 2, 2)
    assert result["rows"] == (5 if engine == "sglang" else 1)
    assert run([*arguments, "--placement-only"]) == 2  # it exists now
    assert "--force" in capsys.readouterr().err
    assert run([*arguments, "--placement-only", "--force"]) == 0


def test_export_pads_by_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_plan(plan_of([layer_plan(3, [[0, 1, 2], [3]], 4)], 2), tmp_path / "plan.json")
    save_profile(Profile(np.array([[9, 5, 1, 1]]), np.array([3]), {"top_k": 2}), tmp_path / "p.npz")
    arguments = ["export", str(tmp_path / "plan.json"), "--to", "trtllm", "--out", str(tmp_path / "m.yaml")]
    assert run(arguments) == 2
    assert "--pad" in capsys.readouterr().err
    assert run([*arguments, "--pad", str(tmp_path / "p.npz")]) == 0
    assert last(capsys)["added"] == 2
    assert "  3: [0, 1, 2, 3, 0, 1]\n" in (tmp_path / "m.yaml").read_text()


def test_import_writes_a_profile_the_planner_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = statistics(tmp_path / "stats")
    out = tmp_path / "p.npz"
    assert (
        run(["import", str(path), "--from", "trtllm", "--out", str(out), "--windows", "2", "--dtype", "bfloat16"]) == 0
    )
    result = last(capsys)
    assert (result["layers"], result["experts"], result["top_k"], result["steps"], result["windows"]) == (1, 4, 2, 4, 2)
    assert result["lis"] == pytest.approx(160 / 105)
    profile = load_profile(out)
    assert profile.counts.tolist() == [[160, 120, 80, 60]]
    assert profile.layer_ids.tolist() == [3]
    assert profile.meta["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "absent.json", "--to", "sglang", "--out", "m.json"],
        ["export", "absent.json", "--to", "sglang", "--out", "m.yaml"],
        ["export", "absent.json", "--to", "vllm", "--out", "m.json"],
        ["export", "absent.json", "--to", "sglang", "--out", "m.json", "--ep-size", "0"],
        ["import", "absent", "--from", "trtllm", "--out", "p.npz"],
        ["import", "absent", "--from", "sglang", "--out", "p.npz", "--windows", "-1"],
        ["import", "--from", "trtllm", "--out", "p.npz"],
    ],
)
def test_wrong_input_is_one_line_and_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_room_needs_no_torch() -> None:
    code = (
        "import sys, equipoise.exchange as x\n"
        "[x.exporter(n) for n in x.EXPORTERS], [x.importer(n) for n in x.IMPORTERS]\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
