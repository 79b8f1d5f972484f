"""`balance` with a gate, end to end on the bundled model, and what is refused before a weight is read."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import equipoise as eq
from equipoise.cli.main import run
from equipoise.demo import calibration_text, heldout_text
from equipoise.evaluation.data import Window, batches, windows
from equipoise.evaluation.paired import Measure
from equipoise.evaluation.perplexity import evaluate_text, paired_difference
from equipoise.files import load_plan, load_profile
from equipoise.files.text import read_texts
from equipoise.gating.reading import Reading
from equipoise.models import load_model
from equipoise.options import GateOptions
from equipoise.pipeline.text import hold_back
from equipoise.reporting import load_metrics

SEQ = 48
OPTIONS = ["--seq-len", str(SEQ), "--importance-tokens", "192", "--robust-windows", "1", "--gate-tries", "3"]
PIQA = [
    {"goal": f"To reach place {i}", "sol1": f"walk to {i}", "sol2": f"sing to {i}", "label": i % 2} for i in range(60)
]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little of the bundled text, and 60 made-up items of PIQA."""
    root = tmp_path_factory.mktemp("gate")
    for name, source, count in (("a", calibration_text(), 12), ("b", heldout_text(), 4)):
        with gzip.open(source, "rt", encoding="utf-8") as file:
            rows = [json.loads(line)["text"][:1500] for _, line in zip(range(count), file, strict=False)]
        (root / f"{name}.txt").write_text("\n".join(row.replace("\n", " ") for row in rows), encoding="utf-8")
    (root / "tasks").mkdir()
    (root / "tasks" / "piqa_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PIQA), encoding="utf-8")
    return root


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    """Leave out the fresh process and the page, which other tests have."""
    module = sys.modules["equipoise.pipeline.balance"]
    monkeypatch.setattr(module, "reload_difference", lambda *_: 0.0)
    monkeypatch.setattr(module, "write_report", lambda run: (run / "report.html").write_text("<html>left out"))


def _balance(room: Path, out: Path, capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    data = ["--data", str(room / "a.txt"), "--heldout", str(room / "b.txt")]
    assert run(["balance", *data, *OPTIONS, "--out", str(out), *arguments]) == 0
    printed, _ = capfd.readouterr()
    return json.loads(printed.splitlines()[-1]), printed


def _gate_windows(room: Path) -> list[Window]:
    cut = windows(load_model("demo").tokenizer, read_texts([room / "a.txt"]), SEQ)
    return hold_back(cut, GateOptions().gate_share)[1]


@pytest.mark.usefixtures("quick")
def test_a_loose_bound_lets_the_most_balanced_plan_through(
    room: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    line, printed = _balance(room, tmp_path / "run", capfd, "--max-perplexity-rise", "50")
    gate = line["gate"]
    assert gate["bound"] == {"max_accuracy_drop": None, "max_perplexity_rise": 50.0}
    assert (gate["tried"], gate["refused"]) == (1, [])
    assert gate["items"] == {"windows": len(_gate_windows(room))}
    front = load_metrics(tmp_path / "run" / "metrics.json").gate.front
    assert [entry.state for entry in front] == ["accepted"] + ["not tried"] * (len(front) - 1)
    assert [entry.lis for entry in front] == sorted(entry.lis for entry in front)
    assert gate["accepted"]["lis"] == load_plan(tmp_path / "run" / "plan.json").predicted["lis"]
    assert not (tmp_path / "run" / "refused-plan.json").exists()
    assert "perplexity rise 50 % allowed" in printed
    # what judges plans calibrates none
    tokens = load_profile(tmp_path / "run" / "profile.npz").meta["tokens"]
    every = windows(load_model("demo").tokenizer, read_texts([room / "a.txt"]), SEQ)
    assert tokens == SEQ * (len(every) - gate["items"]["windows"])


def test_a_tight_bound_refuses_and_says_why(room: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    line, printed = _balance(room, tmp_path / "run", capfd, "--max-perplexity-rise", "0.0001")
    gate, out = line["gate"], tmp_path / "run"
    first = gate["refused"][0]
    document = load_metrics(out / "metrics.json")
    assert first == document.gate.front[0].model_dump(mode="json")
    assert first["measured"][0]["inside"] is False
    assert "0.0001 %" in first["reason"]
    assert f"plan 1 refused: {first['reason']}" in printed
    # the plan that was refused is kept, and measures by hand what was said of it
    refused = load_plan(out / "refused-plan.json")
    assert refused.predicted["lis"] == first["lis"]
    gated = batches(_gate_windows(room), 8, load_model("demo").model.config)
    before = evaluate_text(load_model("demo").model, gated)
    after = evaluate_text(eq.apply(load_model("demo").model, refused), gated)
    loss, ends = paired_difference(before, after)
    assert (first["measured"][0]["loss"], *first["measured"][0]["ci95"]) == pytest.approx((loss, *ends), rel=1e-6)
    # what was accepted is what the run used, and the page has the story
    plan = load_plan(out / "plan.json")
    assert plan.predicted["lis"] == gate["accepted"]["lis"] > first["lis"]
    if gate["accepted"]["unchanged"]:
        assert all(layer.is_identity for layer in plan.layers)
        assert line["ppl_delta_pct"] == 0
        assert line["lis_after"] == line["lis_before"]
    assert line["reload_max_abs_diff"] == 0
    assert "Accuracy gate" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("quick")
def test_both_bounds(room: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    tasks = ["--max-accuracy-drop", "20", "--gate-tasks", "piqa", "--task-data", str(room / "tasks")]
    line, printed = _balance(
        room, tmp_path / "run", capfd, *tasks, "--max-perplexity-rise", "50", "--gate-limit", "40",
    )  # fmt: skip
    gate = line["gate"]
    assert gate["items"]["documents"] == 40
    assert gate["items"]["windows"] == min(40, len(_gate_windows(room)))
    for entry in load_metrics(tmp_path / "run" / "metrics.json").gate.front:
        if entry.measured:
            assert [one.measure for one in entry.measured] == ["accuracy", "perplexity"]
            inside = all(one.ci95[1] <= one.bound for one in entry.measured)
            assert inside == (entry.state in ("accepted", "passed"))
    assert "accuracy drop 20 points and perplexity rise 50 %" in printed


DROP = ["--max-accuracy-drop", "20", "--gate-tasks"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-perplexity-rise", "0"], "max-perplexity-rise must be above 0"),
        (["--max-perplexity-rise", "nan"], "max-perplexity-rise must be above 0"),
        (["--max-accuracy-drop", "-1", "--gate-tasks", "piqa"], "max-accuracy-drop must be above 0"),
        (["--gate-tasks", "piqa"], "gate-tasks is for a gate, which needs a bound"),
        (["--gate-limit", "5"], "gate-limit is for a gate, which needs a bound"),
        (["--task-data", "TASKS"], "task-data is for a gate, which needs a bound"),
        (["--max-accuracy-drop", "1"], "give gate-tasks"),
        ([*DROP, "piqa", "--gate-text", "FILE"], "give max-perplexity-rise too"),
        ([*DROP, "piqa"], "tasks need their data"),
        ([*DROP, ",", "--task-data", "TASKS"], "--gate-tasks names no task"),
        ([*DROP, "nope", "--task-data", "TASKS"], "no such task: 'nope'"),
        ([*DROP, "winogrande", "--task-data", "TASKS"], "neither winogrande_dev.jsonl"),
        (["--max-accuracy-drop", "1", "--gate-tasks", "piqa", "--task-data", "TASKS"], "cannot be excluded on 60"),
        ([*DROP, "piqa", "--task-data", "TASKS", "--gate-limit", "9"], "cannot be excluded on 9 documents"),
        (["--max-perplexity-rise", "1", "--gate-tries", "0"], "gate-tries must be at least 1"),
        (["--max-perplexity-rise", "1", "--gate-share", "1"], "gate-share is a share"),
        (["--max-perplexity-rise", "1", "--gate-limit", "1"], "at least two windows"),
        (["--max-perplexity-rise", "1", "--gate-text", "FILE"], "must be apart from both"),
        (["--max-perplexity-rise", "1", "--budget", "0.9"], "does not fit budget 0.9"),
        (["--max-perplexity-rise", "1", "--replicas", "2"], "replicas fixes the slots"),
        (["--max-perplexity-rise", "1", "--preset", "paper"], "has a single plan and no front"),
    ],
)
def test_refused_before_a_weight_is_read(
    room: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
):
    if "--task-data" in arguments and "needs a bound" not in said and "names no task" not in said:
        pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    monkeypatch.delenv("EQUIPOISE_TASK_DATA", raising=False)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(sys.modules["equipoise.pipeline.balance"], "load_model", never)
    places = {"TASKS": str(room / "tasks"), "FILE": str(room / "b.txt")}
    data = ["--data", str(room / "a.txt"), "--heldout", str(room / "b.txt")]
    given = [places.get(argument, argument) for argument in arguments]
    assert run(["balance", *data, *OPTIONS, "--out", str(tmp_path / "run"), *given]) == 2
    _, printed = capfd.readouterr()
    assert said in printed
    assert len(printed.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_in_python(room: Path):
    loaded = load_model("demo")
    text = windows(loaded.tokenizer, read_texts([room / "a.txt"]), SEQ)
    calibration, judged = (batches(part, 8, loaded.model.config) for part in hold_back(text, 0.5))
    profile = eq.profile(loaded.model, calibration)
    tight = {"max_perplexity_rise": 1e-4, "gate_tries": 2}
    found = eq.gate("demo", profile, text=judged, **tight)
    assert sum(c.state == "accepted" for c in found.candidates) == 1
    assert found.refused[0] is found.candidates[0]
    assert found.plan.budget.plan_bytes <= found.plan.budget.limit_bytes
    eq.apply(loaded.model, found.plan)

    # An original measured before is taken as it is: against one far worse, the most balanced plan is no loss at all.
    result = evaluate_text(load_model("demo").model, judged)
    worse = Reading(None, Measure("perplexity", result.nll + 1, result.tokens.astype(float), False))
    given = eq.gate("demo", profile, text=judged, original=worse, **tight)
    assert given.candidates[0].state == "accepted"
    assert given.accepted.verdicts[0].loss == pytest.approx(100 * (np.exp(-1) - 1), abs=1)

    for wrong, said in (
        ({}, "needs a bound"),
        ({"max_perplexity_rise": 1.0}, "at least two windows"),
        ({"max_perplexity": 1.0}, "gate option"),
    ):
        with pytest.raises(eq.InputError, match=said):
            eq.gate("demo", profile, **wrong)


def test_text_held_back_is_the_end_of_each_domain():
    items = [Window(np.array([i, i]), domain) for i, domain in enumerate("aabbabbbac")]
    used, apart = hold_back(items, 0.25)
    assert [w.input_ids[0] for w in used] == [0, 1, 4, 2, 3, 5, 6, 9]
    assert [w.domain for w in apart] == ["a", "b"]
    assert {id(w) for w in used} | {id(w) for w in apart} == {id(w) for w in items}
    assert not {id(w) for w in used} & {id(w) for w in apart}
