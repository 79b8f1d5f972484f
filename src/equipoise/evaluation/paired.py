"""Two models on the same documents: the difference of any of the harness's metrics, with an interval.

Every metric the task files use is a weighted mean over documents, or the exponential of one:

    value = sum_i w_i x_i / sum_i w_i        acc, acc_norm, exact_match: x 0 or 1; mc2: x in [0, 1]; bits_per_byte
    value = exp( the same )                  perplexities, x = -log p of the document / its words or bytes, w = those

so that one document's contribution is known, and documents can be paired. n documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from equipoise.errors import InputError
from equipoise.evaluation.perplexity import half_width
from equipoise.types import FloatArray

Kind = Literal["share", "mean", "perplexity"]


@dataclass(frozen=True, eq=False)
class Measure:
    """A metric of one model on one task, document by document.

    Attributes:
        kind: `share` of right answers, in [0, 1]; `mean` of something else; `perplexity`, exp of the mean.
        values: float64 [n].
        weights: float64 [n], above 0; all 1 for a share.
        higher_is_better: what an improvement is.
    """

    kind: Kind
    values: FloatArray
    weights: FloatArray
    higher_is_better: bool = True

    @property
    def mean(self) -> float:
        """Weighted mean of the values."""
        return float(self.values @ self.weights / self.weights.sum())

    @property
    def value(self) -> float:
        """The metric, as the harness defines it."""
        return float(np.exp(self.mean)) if self.kind == "perplexity" else self.mean

    @property
    def stderr(self) -> float:
        """Standard error of the metric over documents (of an exponential by its slope); NaN for one document."""
        n = len(self.values)
        terms = self.weights / self.weights.mean() * (self.values - self.mean)
        error = float(np.std(terms, ddof=1)) / n**0.5 if n > 1 else float("nan")
        return error * (self.value if self.kind == "perplexity" else 1.0)


@dataclass(frozen=True)
class Difference:
    """How much a metric changed.

    Attributes:
        value: after minus before: points (hundredths) for a share, percent for a perplexity, else the metric's unit.
        low: lower end of the interval.
        high: upper end.
        unit: `points`, `%` or "".
        n: documents.
    """

    value: float
    low: float
    high: float
    unit: str
    n: int


def compare(before: Measure, after: Measure, confidence: float = 0.95) -> Difference:
    """The paired difference, after minus before.

    Right-or-wrong answers: the interval of Bonett and Price (2012, Journal of Educational and Behavioral
    Statistics 37:479) for paired proportions, a Wald interval on the discordant documents with one added to
    either kind. It keeps its coverage for few documents and does not shrink to nothing when two models agree on
    all of them. Everything else: a paired t interval on the linearised per-document terms, as in
    `equipoise.evaluation.perplexity.paired_difference`.

    Raises:
        InputError: the two are not over the same documents.
    """
    n = len(before.values)
    if before.kind != after.kind or n != len(after.values) or not np.array_equal(before.weights, after.weights):
        raise InputError("the two runs are not over the same documents: give both the same tasks and --limit")
    change = after.values - before.values
    if before.kind == "share" and _binary(before.values) and _binary(after.values):
        low, high = _bonett_price(int((change > 0).sum()), int((change < 0).sum()), n, confidence)
        return Difference(100 * float(change.mean()), 100 * low, 100 * high, "points", n)
    delta = after.mean - before.mean
    half = half_width(before.weights / before.weights.mean() * (change - delta), confidence)
    low, high = delta - half, delta + half
    if before.kind == "perplexity":
        percent = [100 * float(np.expm1(end)) for end in (delta, low, high)]
        return Difference(percent[0], percent[1], percent[2], "%", n)
    scale, unit = (100.0, "points") if before.kind == "share" else (1.0, "")
    return Difference(scale * delta, scale * low, scale * high, unit, n)


def documents_needed(before: Measure, after: Measure, bound: float, confidence: float = 0.95) -> int | None:
    """Documents at which the worse end of the interval would reach `bound`, if all else stayed as it is.

    The difference and the spread of a document (for right-or-wrong answers: the shares gained and lost) are taken
    from the n documents at hand, so this is an estimate as good as they are.

    Args:
        before: of the original.
        after: of the other model, on the same documents.
        bound: how much worse is allowed, in the unit of `Difference`, above 0.
        confidence: coverage of the interval.

    Returns:
        The number, from 2; None when the difference itself is at the bound or beyond, so that no number would do.
    """
    difference = compare(before, after, confidence)
    sign = -1.0 if before.higher_is_better else 1.0
    if not sign * difference.value < bound:
        return None
    n = len(before.values)
    change = after.values - before.values
    if before.kind == "share" and _binary(before.values) and _binary(after.values):
        gained, lost = float((change > 0).sum()) / n, float((change < 0).sum()) / n

        def inside(m: int) -> bool:
            low, high = _bonett_price(gained * m, lost * m, m, confidence)
            return 100 * (high if sign > 0 else -low) <= bound
    else:
        delta = after.mean - before.mean
        spread = float(np.std(before.weights / before.weights.mean() * (change - delta), ddof=1)) if n > 1 else 0.0
        scale = 100.0 if before.kind == "share" else 1.0
        room = (np.log1p(bound / 100) if before.kind == "perplexity" else bound / scale) - sign * delta

        def inside(m: int) -> bool:
            return bool(stats.t.ppf((1 + confidence) / 2, m - 1) * spread <= room * m**0.5)

    outside, found = 1, 2
    while not inside(found):
        outside, found = found, 2 * found
    while found - outside > 1:
        middle = (outside + found) // 2
        outside, found = (outside, middle) if inside(middle) else (middle, found)
    return found


def least_documents(bound: float, confidence: float = 0.95) -> int:
    """Right-or-wrong answers needed before a drop beyond `bound` points can be excluded, even if none changes."""
    unchanged = Measure("share", np.zeros(2), np.ones(2))
    return documents_needed(unchanged, unchanged, bound, confidence) or 0


def pool(measures: Sequence[Measure]) -> Measure:
    """All documents of several tasks as one measure: each counts once, so a large task counts for more.

    Raises:
        InputError: they are not all shares of right answers.
    """
    if not measures or any(m.kind != "share" for m in measures):
        raise InputError("only shares of right answers can be pooled over tasks")
    return Measure("share", np.concatenate([m.values for m in measures]), np.concatenate([m.weights for m in measures]))


def _binary(values: FloatArray) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _bonett_price(gained: float, lost: float, n: int, confidence: float) -> tuple[float, float]:
    """Ends of the interval of (gained - lost) / n, never beyond -1 and 1."""
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = float(stats.norm.ppf((1 + confidence) / 2)) * ((up + down - (up - down) ** 2) / (n + 2)) ** 0.5
    return max(-1.0, up - down - half), min(1.0, up - down + half)
