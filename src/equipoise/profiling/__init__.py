"""Measuring load and importance on calibration text."""

from equipoise.profiling.measure import profile
from equipoise.profiling.watching import Load, watch

__all__ = ["Load", "profile", "watch"]
