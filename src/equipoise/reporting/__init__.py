"""The report of a run: `metrics.json` in, one self-contained `report.html` out.

`write_report` loads matplotlib, which takes half a second; reading and writing `metrics.json` does not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from equipoise.reporting.metrics_file import Metrics, load_metrics, metrics_from_json, save_metrics

if TYPE_CHECKING:
    from equipoise.reporting.document import write_report

__all__ = ["Metrics", "load_metrics", "metrics_from_json", "save_metrics", "write_report"]


def __getattr__(name: str) -> Any:
    if name != "write_report":
        raise AttributeError(f"module 'equipoise.reporting' has no attribute {name!r}")
    return importlib.import_module("equipoise.reporting.document").write_report
