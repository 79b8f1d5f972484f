"""What balancing does while a model serves, as a plain dict and as Prometheus metrics."""

from equipoise.telemetry.collect import Telemetry
from equipoise.telemetry.readings import read

__all__ = ["Telemetry", "read"]
