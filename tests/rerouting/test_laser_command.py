"""`equipoise laser` on a tiny model: thresholds that load, a table, one JSON line, clear refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import equipoise as eq
from core_models import write_text
from equipoise.cli.main import run
from tiny import FAMILIES, save_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(FAMILIES["mixtral"](), tmp_path_factory.mktemp("laser") / "model")


def test_calibrates_writes_and_measures(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "laser.json"
    arguments = ["laser", str(checkpoint), "--data", str(text), "--seq-len", "32", "--out", str(out)]
    assert run([*arguments, "--max-loss-increase", "0.2"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    result = json.loads(lines[-1])
    assert result["lis"] < result["lis_before"]
    assert result["loss_increase_in_sample"] <= 0.2
    assert result["moved"] > 0
    assert any("with LASER" in line for line in lines)
    assert len(eq.load_laser(out).rules) == 3
    assert run(arguments) == 2
    assert "exists" in capsys.readouterr().err


def test_a_bound_of_zero_keeps_the_model(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = write_text(tmp_path / "text.txt")
    arguments = ["laser", str(checkpoint), "--data", str(text), "--seq-len", "32", "--out", str(tmp_path / "l.json")]
    assert run([*arguments, "--max-loss-increase", "0"]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["loss_increase"] == 0
    assert result["moved"] == 0
    assert result["lis"] == result["lis_before"]


@pytest.mark.parametrize(("more", "word"), [(["--max-loss-increase", "3"], "[0, 1]"), (["--seq-len", "1"], "seq-len")])
def test_wrong_input(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], word: str):
    text = write_text(tmp_path / "text.txt")
    base = ["laser", str(checkpoint), "--data", str(text), "--out", str(tmp_path / "l.json"), "--seq-len", "32"]
    assert run([*base, *more]) == 2
    assert word in capsys.readouterr().err
    assert run(["laser", str(checkpoint), "--out", str(tmp_path / "l.json")]) == 2
    assert "no calibration text" in capsys.readouterr().err
    assert not (tmp_path / "l.json").exists()
