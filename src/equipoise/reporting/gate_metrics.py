"""The `gate` part of `metrics.json`: every plan of the front, what was measured of it, which was accepted and why.

    {"bounds": {"max_accuracy_drop": 0.5, "max_perplexity_rise": null}, "tasks": ["piqa"], "items": {"documents": 1838},
     "tried": 3, "front": [{"state": "refused", "lis": ..., "measured": [{...}], "reason": "..."}, ...], "seconds": ...}

Plans stand from the most balanced to the safest, the unchanged model last. Losses are amounts lost: above 0 is worse.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from equipoise.errors import InputError

Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Measured(_Strict):
    """One plan against one bound.

    Attributes:
        measure: `accuracy` (points) or `perplexity` (percent).
        loss: by how much the plan is worse than the original model.
        ci95: paired 95 % interval of the loss, better end first.
        bound: loss that is allowed.
        n: documents or windows.
        inside: whether the worse end keeps to the bound.
        needed: documents or windows that would resolve it; null when inside, or when no number would.
    """

    measure: Literal["accuracy", "perplexity"]
    loss: Finite
    ci95: Annotated[tuple[Finite, Finite], Field(strict=False)]
    bound: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    n: Count
    inside: bool
    needed: Count | None


class FrontEntry(_Strict):
    """A plan of the front, or the unchanged model.

    Attributes:
        unchanged: True for the unchanged model.
        state: `accepted`, `passed` (inside, but less balanced than the accepted one), `refused` or `not tried`.
        lis: predicted, in sample, mean over layers.
        quality_loss: predicted: importance-weighted share of tokens on low slots.
        replicas: spare slots over all layers.
        quantized: experts without a slot at the original precision, over all layers.
        quality_weight: exchange rate at which it is optimal; null for the unchanged model.
        measured: one entry a bound; empty when not tried.
        reason: in words.
    """

    unchanged: bool
    state: Literal["accepted", "passed", "refused", "not tried"]
    lis: Amount
    quality_loss: Amount
    replicas: Count
    quantized: Count
    quality_weight: Amount | None
    measured: list[Measured]
    reason: str


class Bounds(_Strict):
    """What was allowed: points of accuracy, percent of perplexity; null without that bound."""

    max_accuracy_drop: Amount | None
    max_perplexity_rise: Amount | None


class Gate(_Strict):
    """The whole search.

    Attributes:
        bounds: what was allowed.
        tasks: gate tasks as given.
        items: `documents` and `windows` measured of each plan.
        tried: plans measured.
        front: from the most balanced to the safest, the unchanged model last.
        seconds: of the search.
    """

    bounds: Bounds
    tasks: list[str]
    items: dict[Literal["documents", "windows"], Count]
    tried: Count
    front: Annotated[list[FrontEntry], Field(min_length=1)]
    seconds: Amount

    @property
    def accepted(self) -> FrontEntry:
        """The entry that was accepted."""
        return next(entry for entry in self.front if entry.state == "accepted")

    @property
    def refused(self) -> list[FrontEntry]:
        """The entries that were refused, the most balanced first."""
        return [entry for entry in self.front if entry.state == "refused"]

    def brief(self) -> dict[str, object]:
        """For the last JSON line of `balance`."""
        return {
            "accepted": self.accepted.model_dump(mode="json"),
            "refused": [entry.model_dump(mode="json") for entry in self.refused],
            "bound": self.bounds.model_dump(mode="json"),
            "tried": self.tried,
            "items": dict(self.items),
            "seconds": self.seconds,
        }


def check_gate(gate: Gate, replicas: int, quantized: int) -> None:
    """Check that the parts agree with each other and with the run.

    Args:
        gate: of the run.
        replicas: of the run's plan.
        quantized: of the run's plan.

    Raises:
        InputError: naming what differs.
    """
    states = [entry.state for entry in gate.front]
    if states.count("accepted") != 1:
        raise InputError(f"gate: {states.count('accepted')} plans are accepted instead of one; make the run again")
    if [entry.unchanged for entry in gate.front] != [False] * (len(states) - 1) + [True]:
        raise InputError("gate: the unchanged model must be the last of the front, and only the last")
    found = (gate.accepted.replicas, gate.accepted.quantized)
    if found != (replicas, quantized):
        raise InputError(
            f"gate: the accepted plan has {found[0]} replicas and {found[1]} quantized experts, the run has {replicas} "
            f"and {quantized}; make the run again"
        )
    if gate.tried != sum(1 for entry in gate.front if entry.measured):
        raise InputError(f"gate: {gate.tried} plans are said to be tried, but other many have figures")
    bounds = {"accuracy": gate.bounds.max_accuracy_drop, "perplexity": gate.bounds.max_perplexity_rise}
    for entry in gate.front:
        for one in entry.measured:
            bound = bounds[one.measure]
            if bound is None or not math.isclose(one.bound, bound) or one.inside != (one.ci95[1] <= one.bound):
                raise InputError(f"gate: a verdict on {one.measure} does not fit its bound or interval")
        passed = all(one.inside for one in entry.measured)
        fits = {"refused": not passed, "not tried": not entry.measured}.get(
            entry.state, passed and (bool(entry.measured) or entry.unchanged)
        )
        if not fits:
            raise InputError(f"gate: a plan is called {entry.state!r} against its own figures")
