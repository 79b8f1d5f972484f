"""Following a stream of load with replicas: policies, and their replay on traces. numpy only, no torch."""

from equipoise.streaming.forecast import Forecaster
from equipoise.streaming.moves import migrate, moved_slots
from equipoise.streaming.options import AdaptiveOptions
from equipoise.streaming.policies import POLICIES, Adaptive, make_policy
from equipoise.streaming.replay import Replay, Step, replay
from equipoise.streaming.trace import Stream, load_stream

__all__ = [
    "POLICIES", "Adaptive", "AdaptiveOptions", "Forecaster", "Replay", "Step", "Stream", "load_stream", "make_policy",
    "migrate", "moved_slots", "replay",
]  # fmt: skip
