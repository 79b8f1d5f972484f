from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from equipoise.cli.main import run


@pytest.fixture
def run_dir(small_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_run, tmp_path / "run", ignore=shutil.ignore_patterns("report.html")))


def test_writes_the_page_and_ends_with_json(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = run_dir / "report.html"
    page.write_text("old")  # the run's own page is made anew without being asked twice
    assert run(["report", str(run_dir)]) == 0
    assert page.read_text().startswith("<!DOCTYPE html>")
    out = capsys.readouterr().out
    last = json.loads(out.splitlines()[-1])
    assert last["out"] == str(page)
    assert last["size"] == page.stat().st_size
    assert (last["layers"], last["experts"]) == (4, 16)
    summary = json.loads((run_dir / "metrics.json").read_text())["summary"]
    assert all(last[key] == summary[key] for key in ("lis_before", "lis_after", "bytes_after", "ppl_after"))
    assert f"{summary['lis_after']:.4f}" in out


def test_an_existing_file_needs_force(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "page.html"
    target.write_text("mine")
    assert run(["report", str(run_dir), "--out", str(target)]) == 2
    assert "--force" in capsys.readouterr().err
    assert target.read_text() == "mine"
    assert run(["report", str(run_dir), "--out", str(target), "--force"]) == 0
    assert target.read_text().startswith("<!DOCTYPE html>")
    assert not (run_dir / "report.html").exists()


def test_wrong_input_is_one_line_and_exit_2(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "metrics.json").write_text("{}")
    for arguments in ([str(tmp_path / "none")], [str(run_dir)], []):
        assert run(["report", *arguments]) == 2
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "Traceback" not in captured.err
        assert captured.out == ""
    assert not (run_dir / "report.html").exists()


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", "--help"]) == 0
    assert "equipoise report run --out" in capsys.readouterr().out
