"""The main job, end to end: `equipoise balance`."""

from equipoise.pipeline.balance import BalanceOptions, balance

__all__ = ["BalanceOptions", "balance"]
