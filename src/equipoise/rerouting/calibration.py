"""Thresholds a layer, from the distributions of its scores, so that the loss on calibration text stays in bounds.

One pass of the untouched model surveys every layer. Candidates for its `gap` and `mass` are a quantile of the distance
between the k-th and the scores after it together with one of the top-k's mass, and no limit at all. For each of them
and each target of a ladder the survey notes what the layer's busiest slot would carry (LIS) and how much score its
tokens would give up, without giving up any. What a unit of score costs in a layer is measured (`sensitivity`, nats a
token). Then

    minimise sum_l LIS_l(r_l)   subject to   sum_l sensitivity_l * lost_l(r_l) <= allowed        (`allotment`)

gives each layer its rule, so that loss is spent where it buys the most balance. Balance at any price is tried first. If
the bound does not hold then, `allowed` is found by trials on the whole calibration text with every layer on: what a
trial really cost over its prediction scales the next. The bound is held by the increase plus one standard error over
windows, because held-out text is other text: more windows leave more of the bound to be used.

    increase = sum_i t_i a_i / sum_i t_i b_i - 1      b, a: loss of window i without and with LASER, t its tokens

Cost: one forward pass over the calibration text for the survey, one a trial (at most `TRIALS`), and those of
`sensitivity` over a few thousand tokens.

L layers, T tokens, E experts, k experts a token selects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedModel

from equipoise.errors import InputError
from equipoise.evaluation.perplexity import TextResult, evaluate_text
from equipoise.models.families import MoELayer
from equipoise.profiling.padding import PaddingTracker
from equipoise.rerouting.allotment import allot
from equipoise.rerouting.install import WINDOW, Forwards, LayerRouting, installed
from equipoise.rerouting.selection import Decision, Rule, Vector, distribution, select
from equipoise.rerouting.sensitivity import sensitivities
from equipoise.rerouting.thresholds import Thresholds
from equipoise.types import FloatArray

if TYPE_CHECKING:
    from equipoise.progress import Track

MAX_LOSS_INCREASE = 0.005
TARGETS = tuple(round(1.15**j, 3) for j in range(10))
GAP_QUANTILE = 0.65
MASS_QUANTILE = 0.98
MEASURED_TARGET = 1.3
"""Where sensitivities are measured: a change of the size that bounds of half a percent allow."""
TRIALS = 7
ENOUGH = 0.93
"""Of the bound: a trial that uses so much of it is the last."""


@dataclass(frozen=True)
class Calibration:
    """Thresholds, and what they do on the text they were calibrated on (in sample).

    Attributes:
        thresholds: one rule a layer.
        loss_before: nats a token.
        loss_after: nats a token.
        increase: relative; 0.005 is half a percent.
        standard_error: of the increase, over windows.
    """

    thresholds: Thresholds
    loss_before: float
    loss_after: float
    increase: float
    standard_error: float


class Survey(LayerRouting):
    """Notes what each rule would do in one layer, and leaves the routing as it is."""

    def __init__(
        self, layer: MoELayer, rule: Rule, padding: PaddingTracker, forwards: Forwards, classes: int, window: int
    ) -> None:
        super().__init__(layer, rule, padding, forwards, classes, 0)
        self.nothing = rule
        # Where the strongest expert may go, the layer may still be better off keeping it.
        self.rules = [(wide, target, keep) for keep in {1, rule.keep} for wide in (False, True) for target in TARGETS]
        # LIS and lost score of the routing as it is, then of each rule; and the limits of those that have any.
        self.sums = np.zeros((1 + len(self.rules), 2))
        self.gap = 0.0
        self.mass = 0.0

    def choose(
        self, scores: torch.Tensor, index: torch.Tensor, before: Vector, real: torch.Tensor | None, logits: bool
    ) -> Decision | None:
        """The family's choice; adds what every rule would have done, weighted with the batch's tokens."""
        own = select(scores, index, Rule(), self._slots, before, real, logits=logits, experts=self.layer.num_experts)
        if own is None or not own.tokens or index.shape[1] >= scores.shape[1]:
            return own
        p = distribution(scores, logits)
        p[:, self.layer.num_experts :] = 0
        if real is not None:
            p, index = p[real], index[real]
        tokens, k = index.shape
        top = p.topk(min(k + max(self.nothing.extra, 1), p.shape[1]), -1).values
        mass = top[:, :k].sum(-1).clamp(min=1e-20)
        distance = (top[:, k - 1 : k] - top[:, k:]) / mass[:, None]
        gap, limit = float(distance.quantile(GAP_QUANTILE)), float(mass.quantile(MASS_QUANTILE))
        self.gap += gap * tokens
        self.mass += limit * tokens
        kept = p.gather(1, index).sum(-1)

        slots = torch.as_tensor(self._slots, device=p.device)

        def outcome(chosen: torch.Tensor, load: torch.Tensor) -> list[float]:
            busiest = float((load / slots).max())
            lost = (kept - p.gather(1, chosen).sum(-1)) / mass
            return [busiest * self.layer.num_experts / (tokens * k), float(lost.mean())]

        self.sums[0] += np.array(outcome(index, own.load)) * tokens
        for row, (wide, target, keep) in enumerate(self.rules, start=1):
            rule = self._rule(gap, limit, wide, target, keep)
            other = select(p, index, rule, self._slots, before)
            if other is not None:
                self.sums[row] += np.array(outcome(other.index, other.load)) * tokens
        return own

    @property
    def outcomes(self) -> tuple[FloatArray, FloatArray]:
        """LIS, and score given up a token, of the layer as it is and of each of its rules: float64 [R] both."""
        lis, lost = self.sums.T / max(self.tokens, 1)
        return lis, np.maximum(lost, 0)

    def rule_of(self, number: int) -> Rule:
        """The rule of row `number` of `outcomes`."""
        if number == 0:
            return self.nothing
        return self._rule(self.gap / self.tokens, self.mass / self.tokens, *self.rules[number - 1])

    def _rule(self, gap: float, mass: float, wide: bool, target: float, keep: int) -> Rule:
        gap, mass = (1.0, 1.0) if wide else (min(gap, 1.0), min(mass, 1.0))
        return replace(self.nothing, gap=gap, mass=mass, target=target, keep=keep)


def loss_increase(before: TextResult, after: TextResult) -> tuple[float, float]:
    """Relative increase of the loss over the same windows, and its standard error.

    A ratio estimator, linearised; the domains are strata (Cochran, Sampling Techniques, 1977, chapters 5 and 6): the
    error is of other windows in the same mixture of domains. Where every domain has one window there are no strata;
    for one window it is inf.
    """
    b, a = float(before.nll @ before.tokens), float(after.nll @ after.tokens)
    ratio, n = a / b, len(before.tokens)
    if n < 2:
        return ratio - 1, float("inf")
    terms: FloatArray = before.tokens * (after.nll - ratio * before.nll)
    names, stratum = np.unique(np.array(before.domains), return_inverse=True)
    if len(names) == n:
        names, stratum = names[:1], np.zeros(n, dtype=np.int64)
    size = np.bincount(stratum)
    rest = terms - (np.bincount(stratum, terms) / size)[stratum]
    return ratio - 1, float(np.sqrt(rest @ rest * n / (n - len(names)))) / b


def calibrate(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, torch.Tensor]],
    *,
    max_loss_increase: float = MAX_LOSS_INCREASE,
    keep_strongest: bool = True,
    extra: int = 6,
    window: int = WINDOW,
    track: Track | None = None,
) -> Calibration:
    """Thresholds for `model`, so that its loss on `batches` rises by at most `max_loss_increase`.

    Args:
        model: balanced or not.
        batches: dicts with input_ids, attention_mask; of the size in which the model is to serve.
        max_loss_increase: relative; 0 keeps the top-k always.
        keep_strongest: never give up a token's strongest expert (with top-1 routing there is nothing else to give up,
            and it may go either way).
        extra: most experts a pool has beside the top-k.
        window: as in `laser`.
        track: shows progress.

    Raises:
        InputError: no text, a bound outside [0, 1], or a router that cannot be adapted.
    """
    if not 0 <= max_loss_increase <= 1:
        raise InputError(f"max-loss-increase is a fraction in [0, 1], got {max_loss_increase}")
    if not len(batches):
        raise InputError("laser: no calibration text; give at least a few windows")
    nothing = Rule(extra=extra, keep=int(keep_strongest))
    none = Thresholds.of(model, nothing)
    with installed(model, none, window, Survey) as surveyed:
        before = evaluate_text(model, batches)
    surveys = {layer.layer.name: layer for layer in surveyed.layers if isinstance(layer, Survey)}
    loss = float(before.nll @ before.tokens / before.tokens.sum())
    # By how many of the strongest experts are kept: giving up the strongest costs another price a unit of score.
    weight = {keep: np.ones(len(surveyed.names)) for keep in {1, nothing.keep}}

    def thresholds(allowed: float) -> tuple[Thresholds, float]:
        """Rules that should cost at most so much, and what they should cost."""
        at = [surveyed.names.index(name) for name in surveys]
        lis, lost = zip(*(survey.outcomes for survey in surveys.values()), strict=True)
        cost = [
            part * np.array([0.0, *(weight[keep][row] for _, _, keep in survey.rules)])
            for row, survey, part in zip(at, surveys.values(), lost, strict=True)
        ]
        picks = allot(lis, cost, allowed)
        rules = {name: survey.rule_of(int(pick)) for (name, survey), pick in zip(surveys.items(), picks, strict=True)}
        return (
            Thresholds.of(model, [rules.get(name, nothing) for name in surveyed.names]),
            sum(float(part[pick]) for part, pick in zip(cost, picks, strict=True)),
        )

    def trial(rules: Thresholds) -> tuple[TextResult, float, float]:
        """Loss with these rules; its relative increase; and that with its margin."""
        with installed(model, rules, window):
            after = evaluate_text(model, batches)
        increase, error = loss_increase(before, after)
        return after, increase, increase + (error if np.isfinite(error) else 0.0)

    def outcome(rules: Thresholds, after: TextResult) -> Calibration:
        now = float(after.nll @ after.tokens / after.tokens.sum())
        return Calibration(rules, loss, now, *loss_increase(before, after))

    if max_loss_increase == 0 or not surveys:
        return outcome(none, before)
    rules, _ = thresholds(np.inf)
    after, _, spent = trial(rules)
    if spent <= max_loss_increase:
        return outcome(rules, after)
    middle = replace(nothing, gap=1.0, target=MEASURED_TARGET)
    for keep in weight:
        weight[keep] = sensitivities(model, batches, replace(middle, keep=keep), window)
    # In nats as predicted; each trial says what one of them really costs.
    low, high = 0.0, thresholds(np.inf)[1]
    allowed = high * max_loss_increase / spent
    best, used = outcome(none, before), 0.0
    trials = range(TRIALS)
    for _ in track(trials, TRIALS, "thresholds") if track else trials:
        rules, predicted = thresholds(allowed)
        after, _, spent = trial(rules)
        if spent <= max_loss_increase:
            low = max(low, allowed)
            if spent > used:
                best, used = outcome(rules, after), spent
            if spent >= ENOUGH * max_loss_increase:
                break
        else:
            high = min(high, allowed)
        step = predicted * max_loss_increase * (1 + ENOUGH) / 2 / spent if spent > 0 else high
        # Rules come in steps, and trials scatter: what would leave the bracket is its middle.
        allowed = step if low < step < high else (low + high) / 2
    return best
