"""One plan against one bound: the figure, its interval, and why that is not enough where it is not.

    accuracy     drop of the share of right answers, points; outside when -low of the paired interval is above the bound
    perplexity   rise, percent; outside when the high end is above the bound

Both are written as an amount lost, so that above zero is worse in either. Intervals are `evaluation.paired.compare`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from equipoise.evaluation.paired import Measure, compare, documents_needed

Name = Literal["accuracy", "perplexity"]
UNITS: dict[str, tuple[str, str, str]] = {
    "accuracy": ("drop", "points", "documents"),
    "perplexity": ("rise", "%", "windows"),
}
"""Name -> (what got worse, its unit, what is counted)."""


@dataclass(frozen=True)
class Verdict:
    """How a plan stands to a bound.

    Attributes:
        name: which bound.
        loss: by how much the plan is worse than the original; points or percent, below 0 is better.
        ci95: paired 95 % interval of the loss, better end first.
        bound: loss that is allowed.
        n: documents or windows.
        needed: documents or windows that would resolve it, if the interval is all that stands in the way; else None.
    """

    name: Name
    loss: float
    ci95: tuple[float, float]
    bound: float
    n: int
    needed: int | None = None

    @property
    def inside(self) -> bool:
        """Whether the worse end of the interval keeps to the bound (an interval without ends does not)."""
        return self.ci95[1] <= self.bound

    @property
    def figure(self) -> str:
        """`drop 0.50 points, 95 % interval -0.20 to 1.20, 600 documents`."""
        word, unit, items = UNITS[self.name]
        digits = 2 if self.name == "accuracy" else 3
        low, high = (plain(end, digits) for end in self.ci95)
        return f"{word} {plain(self.loss, digits)} {unit}, 95 % interval {low} to {high}, {self.n:,} {items}"

    @property
    def reason(self) -> str:
        """One sentence: inside, too wide an interval (and how many items would do), or beyond the bound."""
        word, unit, items = UNITS[self.name]
        digits = 2 if self.name == "accuracy" else 3
        limit = f"{self.bound:g} {unit}"
        worse = plain(self.ci95[1], digits)
        if self.inside:
            return f"{word} of {self.name} at worst {worse} {unit}, inside {limit}"
        if self.needed is not None:
            return (
                f"interval too wide: {word} of {self.name} at worst {worse} {unit}, bound {limit}; about "
                f"{self.needed:,} {items} instead of {self.n:,} would resolve it"
            )
        beyond = "with all of its interval" if self.ci95[0] > self.bound else "in the estimate itself"
        return f"{word} of {self.name} {plain(self.loss, digits)} {unit} is beyond {limit}, {beyond}"

    def to_json(self) -> dict[str, Any]:
        """As in `metrics.json`."""
        return {
            "measure": self.name,
            "loss": self.loss,
            "ci95": list(self.ci95),
            "bound": self.bound,
            "n": self.n,
            "inside": self.inside,
            "needed": self.needed,
        }


def plain(value: float, digits: int) -> str:
    """Rounded; what rounds to zero has no sign."""
    text = f"{value:.{digits}f}"
    return text if float(text) else text.lstrip("-")


def judge(name: Name, before: Measure, after: Measure, bound: float) -> Verdict:
    """Compare a plan with the original on the same items.

    Args:
        name: which bound.
        before: of the original.
        after: of the plan.
        bound: loss that is allowed: points for accuracy, percent for perplexity.

    Raises:
        InputError: the two are not over the same items.
    """
    difference = compare(before, after)
    ends = (difference.low, difference.high)
    loss = difference.value
    if before.higher_is_better:
        loss, ends = 0.0 - loss, (0.0 - ends[1], 0.0 - ends[0])
    verdict = Verdict(name, loss, ends, bound, difference.n)
    if verdict.inside:
        return verdict
    return Verdict(name, loss, ends, bound, difference.n, documents_needed(before, after, bound))
