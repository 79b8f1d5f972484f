"""What a gate found: every plan of the front with its verdicts, and the plan that was accepted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from equipoise.gating.verdict import Verdict
from equipoise.options import GateOptions
from equipoise.types import Plan

State = Literal["accepted", "passed", "refused", "not tried"]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A plan of the front, or the unchanged model behind it.

    Attributes:
        plan: the plan.
        quality_weight: exchange rate at which it is optimal; None for the unchanged model.
        state: `accepted`; `passed`, inside the bounds but less balanced than the accepted one; `refused`; `not tried`.
        verdicts: one a bound; empty when not tried, and for the unchanged model, which loses nothing.
    """

    plan: Plan
    quality_weight: float | None
    state: State
    verdicts: tuple[Verdict, ...] = ()

    @property
    def lis(self) -> float:
        """Predicted, in sample, mean over layers."""
        return self.plan.predicted["lis"]

    @property
    def reason(self) -> str:
        """Why it was accepted or refused, or why it was not tried."""
        if self.quality_weight is None:
            return "the unchanged model loses nothing"
        if not self.verdicts:
            return "not tried: the search ended before it"
        refusals = [verdict.reason for verdict in self.verdicts if not verdict.inside]
        return "; ".join(refusals or [verdict.reason for verdict in self.verdicts])

    def to_json(self) -> dict[str, Any]:
        """As in `metrics.json`."""
        return {
            "unchanged": self.quality_weight is None,
            "state": self.state,
            "lis": self.lis,
            "quality_loss": self.plan.predicted["quality_loss"],
            "replicas": self.plan.num_replicas,
            "quantized": self.plan.num_quantized,
            "quality_weight": self.quality_weight,
            "measured": [verdict.to_json() for verdict in self.verdicts],
            "reason": self.reason,
        }


@dataclass(frozen=True, eq=False)
class GateResult:
    """The outcome of a search.

    Attributes:
        options: bounds and what was measured on.
        candidates: from the most balanced to the safest, the unchanged model last; exactly one is accepted.
        items: `documents` and `windows` measured of each plan, those there are.
        seconds: of the search, the original's measurement with it unless it was given.
    """

    options: GateOptions
    candidates: tuple[Candidate, ...]
    items: dict[str, int]
    seconds: float

    @property
    def accepted(self) -> Candidate:
        """The most balanced plan measured inside the bounds, or the unchanged model."""
        return next(c for c in self.candidates if c.state == "accepted")

    @property
    def plan(self) -> Plan:
        """Of the accepted candidate."""
        return self.accepted.plan

    @property
    def refused(self) -> tuple[Candidate, ...]:
        """Those measured and not inside, the most balanced first."""
        return tuple(c for c in self.candidates if c.state == "refused")

    def to_json(self) -> dict[str, Any]:
        """As in `metrics.json`."""
        return {
            "bounds": {
                "max_accuracy_drop": self.options.max_accuracy_drop,
                "max_perplexity_rise": self.options.max_perplexity_rise,
            },
            "tasks": list(self.options.gate_tasks),
            "items": self.items,
            "tried": sum(1 for c in self.candidates if c.verdicts),
            "front": [c.to_json() for c in self.candidates],
            "seconds": self.seconds,
        }
