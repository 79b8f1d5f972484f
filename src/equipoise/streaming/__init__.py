"""Following a stream of load with replicas: policies, and their replay on traces. numpy only, no torch."""

from equipoise.streaming.adversarial import Adversarial, adversarial_stream, choose_adversarial
from equipoise.streaming.documents import read_documents
from equipoise.streaming.forecast import Forecaster
from equipoise.streaming.moves import migrate, moved_slots
from equipoise.streaming.options import AdaptiveOptions
from equipoise.streaming.policies import POLICIES, Adaptive, make_policy
from equipoise.streaming.replay import Replay, Step, follow, replay
from equipoise.streaming.trace import Stream, load_stream

__all__ = [
    "POLICIES", "Adaptive", "AdaptiveOptions", "Adversarial", "Forecaster", "Replay", "Step", "Stream",
    "adversarial_stream", "choose_adversarial", "follow", "load_stream", "make_policy", "migrate", "moved_slots",
    "read_documents", "replay",
]  # fmt: skip
