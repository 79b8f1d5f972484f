"""The accuracy gate: the most balanced plan whose measured loss of quality is shown to stay inside a bound."""

from equipoise.gating.gate import gate
from equipoise.gating.result import Candidate, GateResult

__all__ = ["Candidate", "GateResult", "gate"]
