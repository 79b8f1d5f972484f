"""Prometheus metrics: the dict's figures under bounded labels, in a form that a scrape parses."""

from __future__ import annotations

import sys
import urllib.request

import pytest

import equipoise as eq
from equipoise.models import find_layers
from equipoise.telemetry.prometheus import METRICS, PrometheusCollector
from runtime.balancer_cases import balanced, logits, skewed

prometheus_client = pytest.importorskip("prometheus_client")
parser = pytest.importorskip("prometheus_client.parser")


@pytest.fixture(scope="module")
def serving():
    """A model that has served a window, with a balancer that moved slots."""
    model = balanced()
    with eq.StreamingBalancer(model, "short", window=42) as balancer:
        balancer.observe(skewed(model, 7))
        logits(model)
        yield model, eq.Telemetry(model, balancer=balancer)


def exposed(collector):
    """Name and labels -> value, as a scrape reads them."""
    registry = prometheus_client.CollectorRegistry()
    registry.register(collector)
    text = prometheus_client.generate_latest(registry).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_figures_are_the_dicts(serving):
    _, telemetry = serving
    found, reading = exposed(PrometheusCollector(telemetry)), telemetry.read()
    wanted = {(spec.name, ()): reading[spec.key] for spec in METRICS if reading[spec.key] is not None}
    assert found == pytest.approx(wanted)
    assert found["equipoise_tokens_total", ()] == 42
    # What is not there is not exported as a zero.
    assert {spec.name for spec in METRICS} - {name for name, _ in found} == {
        "equipoise_laser_decisions_total",
        "equipoise_laser_rerouted_total",
    }


def test_labels_are_bounded_and_only_on_request(serving):
    model, telemetry = serving
    layers = {str(layer.layer_id) for layer in find_layers(model)}
    found = exposed(PrometheusCollector({"a": telemetry, "b": telemetry}, by_layer=True))
    assert {key for _, labels in found for key, _ in labels} == {"model", "layer"}
    values = {key: {dict(labels).get(key) for _, labels in found} - {None} for key in ("model", "layer")}
    assert values == {"model": {"a", "b"}, "layer": layers}
    own = [spec for spec in METRICS if spec.by_layer and spec.key in ("lis", "lis_without_replicas", "slot_imbalance",
                                                                      "moves")]  # fmt: skip
    whole = [spec for spec in METRICS if not spec.by_layer]
    assert len(found) == 2 * (len(own) * len(layers) + len(whole))
    reading = telemetry.read()
    for layer in layers:
        labels = (("layer", layer), ("model", "a"))
        assert found["equipoise_lis", labels] == pytest.approx(reading["layers"][layer]["lis"])
    # Summed over layers a counter is the whole, so no metric is exported with layers and without.
    moved = [found["equipoise_balancer_moves_total", (("layer", layer), ("model", "a"))] for layer in layers]
    assert sum(moved) == reading["moves"] > 0


def test_it_is_served_over_http(serving):
    _, telemetry = serving
    registry = prometheus_client.CollectorRegistry()
    registry.register(PrometheusCollector(telemetry))
    server, thread = prometheus_client.start_http_server(0, "127.0.0.1", registry)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert "# TYPE equipoise_lis gauge" in text
    assert "# TYPE equipoise_balancer_moves_total counter" in text


def test_a_registry_refuses_two_collectors_of_the_same_names(serving):
    _, telemetry = serving
    registry = prometheus_client.CollectorRegistry()
    registry.register(PrometheusCollector(telemetry))
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(PrometheusCollector(telemetry))


def test_wrong_names_and_a_missing_extra_are_one_line(serving, monkeypatch):
    _, telemetry = serving
    for name in ("", "two\nlines", 3):
        with pytest.raises(eq.InputError, match="model name"):
            PrometheusCollector({name: telemetry})
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(eq.InputError) as refusal:
        PrometheusCollector(telemetry)
    assert str(refusal.value) == "prometheus-client is not installed: pip install 'equipoise[telemetry]'"
