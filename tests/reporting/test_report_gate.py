"""The gate in `metrics.json` and on the page: only of a run with one, and never against its own figures."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from page_reader import Page
from synthetic_run import NEEDED, make_run

from equipoise.errors import InputError
from equipoise.reporting import load_metrics, save_metrics, write_report
from equipoise.reporting.metrics_file import metrics_from_json


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("gated") / "run"
    document = make_run(path, layers=2, experts=8, gate=("accuracy", "perplexity"))
    write_report(path)
    return path, document


def test_the_page_shows_every_plan_of_the_front(gated: tuple[Path, dict[str, Any]]) -> None:
    path, document = gated
    page = Page.read(path / "report.html")
    assert page.problems == []
    columns, *rows = page.tables["t-gate"]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "unchanged"]
    assert [row[1] for row in rows] == ["refused", "accepted", "not tried", "passed", "not tried"]
    for row, entry in zip(rows, document["gate"]["front"], strict=True):
        assert float(row[columns.index("LIS (predicted)")]) == entry["lis"]
        assert row[2] == entry["reason"]
        measured = {one["measure"]: one for one in entry["measured"]}
        for name, head in (("accuracy", "accuracy drop (points)"), ("perplexity", "perplexity rise (%)")):
            cell = row[columns.index(head)]
            assert (cell == "") == (name not in measured)
            if cell:
                assert float(cell) == pytest.approx(measured[name]["loss"], abs=1e-4)
    assert rows[0][columns.index("documents that would resolve it")] == str(NEEDED)
    assert "accepted: plan 2" in page.text
    assert "refused-plan.json" in page.text
    picture = next(v for tag, v in page.tags if tag == "svg" and "Plans of the gate" in str(v["aria-label"]))
    assert "plan 1, LIS 0.90, refused (accuracy worse by" in str(picture["aria-label"])


@pytest.mark.parametrize("name", ["accuracy", "perplexity"])
def test_one_bound_is_one_panel(tmp_path: Path, name: str) -> None:
    make_run(tmp_path / "run", layers=1, experts=4, gate=(name,))
    page = Page.read(write_report(tmp_path / "run"))
    assert page.problems == []
    assert ("drop of accuracy (points)" in page.text) == (name == "accuracy")
    assert ("rise of perplexity (%)" in page.text) == (name == "perplexity")


def test_without_a_gate_nothing_speaks_of_one(small_run: Path, small_page: Page) -> None:
    assert "t-gate" not in small_page.tables
    assert "Accuracy gate" not in small_page.text
    assert "gate" not in json.loads((small_run / "metrics.json").read_text(encoding="utf-8"))


def test_it_is_written_and_read_as_it_is(gated: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, document = gated
    found = load_metrics(path / "metrics.json")
    assert found.gate is not None
    assert found.gate.model_dump(mode="json") == document["gate"]
    save_metrics(found, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (path / "metrics.json").read_bytes()
    brief = found.gate.brief()
    assert set(brief) == {"accepted", "refused", "bound", "tried", "items", "seconds"}
    assert brief["accepted"] == document["gate"]["front"][1]
    assert brief["refused"] == [document["gate"]["front"][0]]


def _two(front: list[dict[str, Any]]) -> None:
    front[3]["state"] = "accepted"


def _narrow(front: list[dict[str, Any]]) -> None:
    front[0]["measured"][0]["ci95"] = [-0.1, 0.1]


def _bound(front: list[dict[str, Any]]) -> None:
    front[1]["measured"][0]["bound"] = 5.0


def _called(front: list[dict[str, Any]]) -> None:
    front[3]["state"] = "refused"


def _untried(front: list[dict[str, Any]]) -> None:
    front[2]["state"] = "passed"


def _other_plan(front: list[dict[str, Any]]) -> None:
    front[1]["replicas"] += 1


def _no_end(front: list[dict[str, Any]]) -> None:
    del front[4]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_two, "2 plans are accepted"),
        (_narrow, "does not fit its bound or interval"),
        (_bound, "does not fit its bound or interval"),
        (_called, "'refused' against its own figures"),
        (_untried, "'passed' against its own figures"),
        (_other_plan, "the accepted plan has"),
        (_no_end, "unchanged model must be the last"),
    ],
)
def test_a_gate_against_its_own_figures_is_refused(gated: tuple[Path, dict[str, Any]], change: Any, said: str) -> None:
    document = copy.deepcopy(gated[1])
    change(document["gate"]["front"])
    with pytest.raises(InputError, match=said):
        metrics_from_json(document)
