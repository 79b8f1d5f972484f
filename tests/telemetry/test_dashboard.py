"""The Grafana dashboard in examples/: every metric that is exported has a panel, and no panel asks for another."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from equipoise.telemetry.prometheus import METRICS

FILE = Path(__file__).parents[2] / "examples" / "grafana_dashboard.json"


@pytest.fixture(scope="module")
def dashboard():
    return json.loads(FILE.read_text(encoding="utf-8"))


def expressions(dashboard):
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_its_metrics_are_the_exported_ones(dashboard):
    asked = set(re.findall(r"equipoise_\w+", " ".join(expressions(dashboard))))
    assert asked == {spec.name for spec in METRICS}


def test_counters_are_rates_and_gauges_are_not(dashboard):
    counters = {spec.name for spec in METRICS if spec.is_counter}
    since_start = {'sum(equipoise_balancer_failures_total{job=~"$job"})'}
    for expression in expressions(dashboard):
        rated = set(re.findall(r"rate\((equipoise_\w+)", expression))
        assert rated <= counters
        if expression not in since_start:
            assert set(re.findall(r"equipoise_\w+", expression)) & counters == rated
        assert expression.count("(") == expression.count(")")
        # Labels that exist: job is Prometheus's own, layer the collector's.
        assert set(re.findall(r"by \((\w+)\)", expression)) <= {"layer"}
        assert set(re.findall(r"(\w+)=~", expression)) <= {"job"}


def test_it_can_be_imported(dashboard):
    assert dashboard["id"] is None  # Grafana gives it one
    assert dashboard["schemaVersion"] >= 36
    assert dashboard["title"]
    assert re.fullmatch(r"[\w-]{1,40}", dashboard["uid"])
    source, job = dashboard["templating"]["list"]
    assert (source["type"], source["query"], source["name"]) == ("datasource", "prometheus", "datasource")
    assert re.findall(r"equipoise_\w+", job["query"]["query"]) == ["equipoise_tokens_total"]
    wanted = {"type": "prometheus", "uid": "${datasource}"}
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in dashboard["panels"]:
        assert panel["type"] in ("stat", "timeseries")
        assert panel["datasource"] == wanted
        assert panel["title"]
        assert panel["description"]
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEF"[: len(panel["targets"])])
        assert all(target["datasource"] == wanted for target in panel["targets"])
    for a, b in itertools.combinations([panel["gridPos"] for panel in dashboard["panels"]], 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in dashboard["panels"])
