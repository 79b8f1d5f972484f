"""Prometheus metrics of telemetry, through `prometheus-client` (the extra `telemetry`).

    from equipoise.telemetry.prometheus import PrometheusCollector
    prometheus_client.REGISTRY.register(PrometheusCollector(telemetry))
    prometheus_client.start_http_server(9100)

A collector reads the same dict as `Telemetry.read` when it is scraped and keeps no state of its own. Labels are bounded
and only on request: `layer`, the model's numbers of its MoE layers, with `by_layer`; `model`, the names that are given,
when a mapping of several models is. With layers a metric is exported by layer only, so that nothing is counted twice
in a sum. What a reading has not (no balancer, no LASER, no window yet) is not exported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from equipoise.errors import InputError
from equipoise.telemetry.collect import Telemetry

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric


@dataclass(frozen=True)
class MetricSpec:
    """A metric.

    Attributes:
        name: as exported; a counter's ends in `_total`.
        key: of the reading.
        help: one line.
        by_layer: whether layers have it apart.
    """

    name: str
    key: str
    help: str
    by_layer: bool = False

    @property
    def is_counter(self) -> bool:
        """True for what only counts up."""
        return self.name.endswith("_total")


METRICS = (
    MetricSpec("equipoise_lis", "lis", "Load Imbalance Score over slots as executed, latest window.", True),
    MetricSpec(
        "equipoise_lis_without_replicas",
        "lis_without_replicas",
        "Load Imbalance Score over experts, as if each had one slot, latest window.",
        True,
    ),
    MetricSpec("equipoise_slot_imbalance", "slot_imbalance", "Busiest slot over the mean slot, latest window.", True),
    MetricSpec("equipoise_tokens_total", "tokens", "Tokens seen, padding left out."),
    MetricSpec("equipoise_windows_total", "windows", "Windows of load that are over."),
    MetricSpec("equipoise_balancer_steps_total", "steps", "Decisions of the balancer."),
    MetricSpec("equipoise_balancer_moves_total", "moves", "Slots that changed their expert.", True),
    MetricSpec("equipoise_balancer_moved_bytes_total", "moved_bytes", "Bytes written for moved slots."),
    MetricSpec("equipoise_balancer_seconds_total", "balancer_seconds", "Time spent deciding and moving, in seconds."),
    MetricSpec("equipoise_balancer_failures_total", "failures", "Steps that failed and left the old map."),
    MetricSpec(
        "equipoise_balancer_missed_windows_total", "missed_windows", "Windows that ended while a step was under way."
    ),
    MetricSpec(
        "equipoise_laser_decisions_total", "laser_decisions", "Token routings that LASER looked at, all layers.", True
    ),
    MetricSpec("equipoise_laser_rerouted_total", "rerouted", "Token routings that left their top-k, all layers.", True),
)
"""Every metric that is exported."""

_LABEL = re.compile(r"[^\n\r]{1,200}")


class PrometheusCollector:
    """A custom collector of prometheus-client.

    Args:
        source: what is read; or name -> what is read, for several models, which then are told apart by `model`.
        by_layer: export by layer what layers have apart.

    Raises:
        InputError: prometheus-client is not installed, or a name is no label.
    """

    def __init__(self, source: Telemetry | Mapping[str, Telemetry], *, by_layer: bool = False) -> None:
        try:
            from prometheus_client import core
        except ImportError as error:
            raise InputError(
                "prometheus-client is not installed: pip install 'equipoise[telemetry]'"
            ) from error  # fmt: skip
        self._families = core
        self._sources: dict[Any, Telemetry] = dict(source) if isinstance(source, Mapping) else {None: source}
        for name in self._sources:
            if name is not None and not (isinstance(name, str) and _LABEL.fullmatch(name)):
                raise InputError(f"telemetry: {name!r} is not a model name of 1 to 200 characters on one line")
        self.by_layer = by_layer

    def describe(self) -> Iterator[Metric]:
        """The families without samples: a registry asks for the names when the collector is registered."""
        for spec in METRICS:
            yield self._family(spec)

    def collect(self) -> Iterator[Metric]:
        """Families with what can be read now."""
        readings = {name: source.read() for name, source in self._sources.items()}
        for spec in METRICS:
            family = self._family(spec)
            for name, reading in readings.items():
                model = [] if name is None else [name]
                if self.by_layer and spec.by_layer:
                    for layer, values in reading["layers"].items():
                        if values[spec.key] is not None:
                            family.add_metric([*model, layer], values[spec.key])
                elif reading[spec.key] is not None:
                    family.add_metric(model, reading[spec.key])
            if family.samples:
                yield family

    def _family(self, spec: MetricSpec) -> Any:
        labels = [
            *([] if None in self._sources else ["model"]),
            *(["layer"] if self.by_layer and spec.by_layer else []),
        ]
        kind = self._families.CounterMetricFamily if spec.is_counter else self._families.GaugeMetricFamily
        return kind(spec.name, spec.help, labels=labels)
