"""Rows of Table 1 side by side: every one kept, failures named."""

import argparse
import json
import sys
from dataclasses import replace

import pytest
from switch_modules import scripts, small_artifact, small_config, small_wikiqa

from equipoise import InputError

finetune, jobs, table1, task = scripts.finetune, scripts.jobs, scripts.table1, scripts.task


def python(code):
    return [sys.executable, "-c", code]


def test_a_failing_command_is_named_and_stops_no_other(tmp_path, capsys):
    commands = {
        "first": python("import sys; print('why it fails', file=sys.stderr); sys.exit(3)"),
        "second": python(f"open({str(tmp_path / 'second')!r}, 'w').close()"),
        "third": [str(tmp_path / "nothing")],
        "fourth": python(f"open({str(tmp_path / 'fourth')!r}, 'w').close()"),
    }
    failed = jobs.run(commands, 1, 1)
    assert failed[0] == "first: ended with 3: why it fails"
    assert failed[1].startswith("third: could not be started")
    assert len(failed) == 2
    assert (tmp_path / "second").exists()
    assert (tmp_path / "fourth").exists()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith("[4/4] fourth: done")


def test_commands_run_side_by_side_with_their_threads(tmp_path):
    """Each of two waits for the other."""
    meet = (
        "import os, pathlib, sys, time; assert os.environ['OMP_NUM_THREADS'] == '3'\n"
        "here = pathlib.Path(sys.argv[1]); (here / sys.argv[2]).touch(); begin = time.monotonic()\n"
        "while len(list(here.iterdir())) < 2:\n"
        "    time.sleep(0.01); assert time.monotonic() < begin + 60"
    )
    assert jobs.run({name: [*python(meet), str(tmp_path), name] for name in ("a", "b")}, 2, 3) == []


def _arguments(**changes):
    values = {"data": "D", "work": "W", "device": "cpu", "threads": 1, "quick": False, "pairs": None}
    return argparse.Namespace(**{**values, **changes})


def test_every_row_has_one_command():
    found = table1.commands(_arguments(pairs=0), (8, 16))
    asked = []
    for command in found.values():
        experts = command[command.index("--experts") + 1]
        asked += [(experts, command[n + 1]) for n, part in enumerate(command) if part == "--row"]
        assert command[command.index("--pairs") + 1] == "0"
    assert sorted(asked) == sorted((str(e), row) for e in (8, 16) for row in table1.ROWS)
    together = [command for command in found.values() if command.count("--row") == 2]
    assert [[c[n + 1] for n, part in enumerate(c) if part == "--row"] for c in together] == [["full", "full + R&Q"]] * 2


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A small untrained model and task for table1.py in this process; the command line up to its own options."""
    path = small_artifact(tmp_path / "switch8.safetensors")
    monkeypatch.setattr(scripts.build, "config", small_config)
    monkeypatch.setattr(scripts.artifact, "path_of", lambda experts: path)
    monkeypatch.setattr(task, "TARGET", 8)
    monkeypatch.setattr(finetune, "QUICK", finetune.Options(epochs=1, pairs=4, questions=3))
    data = small_wikiqa(tmp_path)
    return ["table1.py", "--data", str(data), "--work", str(tmp_path / "work"), "--quick"]


def in_this_process(monkeypatch, failing=()):
    """`jobs.run` without processes: the same command lines, through `main`."""
    ran = []

    def run(commands, number, threads):
        before, failed = sys.argv, []
        for name, command in commands.items():
            ran.append(name)
            if name in failing:
                failed.append(f"{name}: ended with 1: killed")
                continue
            sys.argv = command[1:]
            table1.main()
        sys.argv = before
        return failed

    monkeypatch.setattr(jobs, "run", run)
    return ran


def test_a_table_of_jobs_is_the_table(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [*small, "--json", str(tmp_path / "one.json")])
    table1.main()
    for path in (tmp_path / "work").iterdir():
        path.unlink()
    capsys.readouterr()

    ran = in_this_process(monkeypatch, failing=["8 experts, tune router"])
    command = [*small, "--jobs", "4", "--json", str(tmp_path / "many.json")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as stopped:
        table1.main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: 8 experts, tune router: ended with 1: killed"
    assert not (tmp_path / "many.json").exists()
    assert len(ran) == 10
    kept = list((tmp_path / "work").glob("*.json"))
    assert len(kept) == 10, "what the others made is kept"

    in_this_process(monkeypatch)
    stamps = {path: path.stat().st_mtime_ns for path in kept}
    table1.main()
    assert stamps == {path: path.stat().st_mtime_ns for path in kept}, "and not made again"
    one, many = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "many"))
    assert many["markdown"] == one["markdown"]
    assert many["notes"] == one["notes"]


def test_a_command_line_is_checked_first(small, monkeypatch):
    for extra, why in (
        ([], "--json"),
        (["--json", "x", "--jobs", "0"], "--jobs"),
        (["--json", "x", "--pairs", "-1"], "--pairs"),
    ):
        monkeypatch.setattr("sys.argv", [*small, *extra])
        with pytest.raises(InputError, match=why):
            table1.main()


def test_a_device_is_part_of_a_result(tmp_path):
    path = small_artifact(tmp_path / "a.safetensors", 4)
    options = finetune.options_of(False, 3, "cpu")
    assert options == finetune.Options(pairs=3)
    work = finetune.read_task(small_wikiqa(tmp_path), options)
    assert finetune.key(path, work, options, "full") != finetune.key(
        path, work, replace(options, device="cuda"), "full"
    )
