"""Thresholds a layer, from the distributions of its scores, so that the loss on calibration text stays in bounds.

One pass of the untouched model surveys every layer. Candidates for its `gap` are quantiles of the distance between
the k-th and the scores after it; `mass` is a quantile of the top-k's mass. For each gap and each target of a ladder the
survey notes what the layer's busiest slot would carry (LIS) and how much score its tokens would give up, without
giving up any. A price mu of score then says which rule each layer gets,

    rule_l(mu) = argmin_r  LIS_l(r) + mu * lost_l(r)

so that score is given up in the layers where it buys the most balance. The least mu whose loss on the calibration
text, measured with every layer on, is within the bound is found by bisection; the bound is held by the increase plus
one standard error over windows, because held-out text is other text.

    increase = sum_i t_i a_i / sum_i t_i b_i - 1      b, a: loss of window i without and with LASER, t its tokens

Cost: 2 + `STEPS` forward passes over the calibration text.

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
from equipoise.rerouting.install import WINDOW, LayerRouting, installed
from equipoise.rerouting.prices import count
from equipoise.rerouting.selection import Rule, select
from equipoise.rerouting.thresholds import Thresholds
from equipoise.types import FloatArray

if TYPE_CHECKING:
    from equipoise.progress import Track

MAX_LOSS_INCREASE = 0.005
TARGETS = tuple(round(1.11**j, 3) for j in range(13))
GAP_QUANTILES = (0.65, 1.0)
MASS_QUANTILE = 0.98
RULES = tuple((q, target) for q in range(len(GAP_QUANTILES)) for target in TARGETS)
STEPS = 7
"""Bisections of mu, over five decades: to a tenth of its value."""


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
    """Notes what each target would do in one layer, and leaves the routing as it is."""

    def __init__(self, layer: MoELayer, rule: Rule, padding: PaddingTracker, classes: int, window: int) -> None:
        super().__init__(layer, rule, padding, classes, 0)
        # LIS and lost score of the routing as it is, then of each rule; and the limits of the rules.
        self.sums = np.zeros((1 + len(RULES), 2))
        self.gaps = np.zeros(len(GAP_QUANTILES))
        self.mass = 0.0

    def choose(
        self, p: torch.Tensor, index: torch.Tensor, slots: torch.Tensor, before: torch.Tensor, real: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The family's choice; adds what every rule would have done, weighted with the batch's tokens."""
        still = torch.zeros(len(index), dtype=torch.bool, device=index.device)
        if real is not None:
            p, own = p[real], index[real]
        else:
            own = index
        tokens, k = own.shape
        if not tokens or k >= p.shape[1]:
            return index, still
        top = p.topk(min(k + max(self.rule.extra, 1), p.shape[1]), -1).values
        mass = top[:, :k].sum(-1).clamp(min=1e-20)
        distance = (top[:, k - 1 : k] - top[:, k:]) / mass[:, None]
        gaps = distance.quantile(distance.new_tensor(GAP_QUANTILES))
        limit = float(mass.quantile(MASS_QUANTILE).clamp(max=1))
        self.gaps += gaps.double().cpu().numpy() * tokens
        self.mass += limit * tokens
        kept = p.gather(1, own).sum(-1)

        def outcome(chosen: torch.Tensor) -> list[float]:
            busiest = float((count(chosen, len(slots)) / slots).max())
            lost = (kept - p.gather(1, chosen).sum(-1)) / mass
            return [busiest * self.layer.num_experts / (tokens * k), float(lost.mean())]

        self.sums[0] += np.array(outcome(own)) * tokens
        for row, (q, target) in enumerate(RULES, start=1):
            rule = replace(self.rule, gap=min(float(gaps[q]), 1.0), mass=limit, target=target)
            self.sums[row] += np.array(outcome(select(p, own, rule, slots, before)[0])) * tokens
        return index, still

    def rule_for(self, mu: float) -> Rule:
        """The rule of this layer where a unit of score costs mu of LIS."""
        if not self.tokens:
            return self.rule
        best = int(np.argmin(self.sums @ np.array([1.0, mu])))
        if best == 0:
            return self.rule
        q, target = RULES[best - 1]
        gap = min(float(self.gaps[q]) / self.tokens, 1.0)
        return replace(self.rule, gap=gap, mass=min(self.mass / self.tokens, 1.0), target=target)


def loss_increase(before: TextResult, after: TextResult) -> tuple[float, float]:
    """Relative increase of the loss over the same windows, and its standard error (inf for one window)."""
    b, a = float(before.nll @ before.tokens), float(after.nll @ after.tokens)
    ratio = a / b
    if len(before.tokens) < 2:
        return ratio - 1, float("inf")
    terms: FloatArray = before.tokens * (after.nll - ratio * before.nll)
    return ratio - 1, float(np.std(terms, ddof=1)) * len(terms) ** 0.5 / b


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
    surveys = {layer.layer.name: layer for layer in surveyed.layers}

    def thresholds(mu: float) -> Thresholds:
        rules = [
            survey.rule_for(mu) if isinstance(survey := surveys.get(name), Survey) else nothing
            for name in surveyed.names
        ]
        return Thresholds.of(model, rules)

    # From "balance at any price" to a price at which only what is nearly free moves, evenly in the logarithm.
    low, high = -1.0, 4.0
    best, result = none, before
    tries = [low, *[None] * STEPS] if max_loss_increase > 0 else []
    for mark in track(tries, len(tries), "thresholds") if track else tries:
        at = (low + high) / 2 if mark is None else mark
        rules = thresholds(10**at)
        with installed(model, rules, window):
            after = evaluate_text(model, batches)
        increase, error = loss_increase(before, after)
        margin = error if np.isfinite(error) else 0.0
        if increase + margin <= max_loss_increase:
            best, result, high = rules, after, at
            if mark is not None:
                break
        elif mark is None:
            low = at
    increase, error = loss_increase(before, result)
    mean = [float(r.nll @ r.tokens / r.tokens.sum()) for r in (before, result)]
    return Calibration(best, mean[0], mean[1], increase, error)
