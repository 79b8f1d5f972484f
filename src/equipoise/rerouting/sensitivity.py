"""What giving up score costs, layer by layer: nats a token for one unit of lost score.

A layer's share of the loss cannot be seen in the loss itself: on a few thousand tokens its standard error is larger
than what one layer does, because any change, however small, makes later routers decide some tokens otherwise. The
divergence of the predictions from those of the untouched model is never negative and far less scattered. All layers
reroute by one rule, then all but one group of layers:

    cost[g] = KL(untouched || all) - KL(untouched || all but g)       mean over tokens, nats
    sensitivity[g] = cost[g] / lost score of the group's layers

The difference is taken at the full change, where the noise of later decisions is in both terms. What is left of it is
shrunk towards the mean over groups, by how much groups differ against their standard errors (empirical Bayes).

Cost: 2 + groups forward passes over at most `TOKENS` tokens.

N tokens, V words, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from equipoise.evaluation.data import IGNORED
from equipoise.rerouting.install import LayerRouting, installed
from equipoise.rerouting.selection import Decision, Rule, Vector, distribution
from equipoise.rerouting.thresholds import Thresholds
from equipoise.types import FloatArray

TOKENS = 2048
GROUPS = 8
LOGITS = 2**27
"""Logits of the untouched model that are kept: 256 MiB in 16 bits."""
LEAST = 0.1
"""Of the mean sensitivity: no layer is taken to be free."""


class Metered(LayerRouting):
    """Also adds up the score that its tokens gave up, as a share of their top-k's."""

    lost = 0.0

    def choose(
        self, scores: torch.Tensor, index: torch.Tensor, before: Vector, real: torch.Tensor | None, logits: bool
    ) -> Decision | None:
        """As the layer's rule says."""
        decision = super().choose(scores, index, before, real, logits)
        if decision is not None and decision.tokens:
            p = distribution(scores, logits)
            held, kept = (p.gather(1, i).sum(-1) for i in (index, decision.index))
            self.lost += float(((held - kept) / held.clamp(min=1e-20))[decision.moved].sum())
        return decision


def sensitivities(
    model: PreTrainedModel, batches: Sequence[Mapping[str, torch.Tensor]], rule: Rule, window: int
) -> FloatArray:
    """Nats a token for a unit of lost score a token, of each MoE layer.

    Args:
        model: balanced or not.
        batches: of calibration text.
        rule: what all layers do while it is measured.
        window: as in `laser`.

    Returns:
        float64 [L], above 0; all 1 where the rule moves no token.
    """
    sample = part_of(batches, min(TOKENS, LOGITS // int(model.config.get_text_config(decoder=True).vocab_size)))
    still = Rule(extra=rule.extra, keep=rule.keep)
    base = [_logits(model, batch) for batch in sample]
    layers = len(Thresholds.of(model, rule).rules)
    groups = np.array_split(np.arange(layers), min(layers, GROUPS))

    def run(off: Sequence[int]) -> tuple[FloatArray, FloatArray]:
        thresholds = Thresholds.of(model, [still if i in off else rule for i in range(layers)])
        with installed(model, thresholds, window, Metered) as routing:
            apart = np.concatenate(
                [_divergence(b, _logits(model, batch)) for b, batch in zip(base, sample, strict=True)]
            )
        lost = {layer.layer.name: getattr(layer, "lost", 0.0) for layer in routing.layers}
        return apart, np.array([lost.get(name, 0.0) for name in routing.names]) / max(len(apart), 1)

    whole, lost = run(())
    if not lost.any():
        return np.ones(layers)
    value, error = np.zeros(len(groups)), np.full(len(groups), np.inf)
    for g, members in enumerate(groups):
        given = lost[members].sum()
        if given > 0:
            terms = whole - run(members.tolist())[0]
            value[g] = terms.mean() / given
            error[g] = terms.std(ddof=1) / len(terms) ** 0.5 / given
    shrunk = shrink(value, error)
    return np.concatenate([np.full(len(members), s) for members, s in zip(groups, shrunk, strict=True)])


def shrink(value: FloatArray, error: FloatArray) -> FloatArray:
    """Empirical Bayes: each value towards the precision-weighted mean, by how much values differ beyond their errors.

    Args:
        value: [G].
        error: [G] standard errors; inf where nothing was measured.

    Returns:
        float64 [G], at least `LEAST` of their mean; all 1 when that is not above 0.
    """
    known = np.isfinite(error)
    weight = np.where(known, 1 / np.maximum(error, 1e-12) ** 2, 0)
    mean = float(weight @ value / weight.sum()) if known.any() else 0.0
    if not mean > 0:
        return np.ones(len(value))
    between = max(0.0, float(np.var(value[known]) - np.mean(error[known] ** 2)))
    trust = np.where(known, between / (between + np.where(known, error, 1) ** 2 + 1e-300), 0)
    return np.maximum(trust * value + (1 - trust) * mean, LEAST * mean)


def part_of(batches: Sequence[Mapping[str, torch.Tensor]], tokens: int) -> list[dict[str, torch.Tensor]]:
    """Batches of fewer rows: about `tokens` tokens in all, rows of up to eight batches spread evenly."""
    count = min(8, len(batches))
    chosen = [batches[int((i + 0.5) * len(batches) / count)] for i in range(count)]
    out = []
    for batch in chosen:
        width = max(1, batch["input_ids"].shape[1])
        rows = max(1, round(tokens / count / width))
        out.append({name: tensor[:rows] for name, tensor in batch.items()})
    return out


@torch.inference_mode()
def _logits(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits [N, V] at the tokens of the text, padding left out."""
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits
    where = batch["labels"] != IGNORED if "decoder_input_ids" in batch else batch["attention_mask"].bool()
    return logits[where.to(logits.device)]


def _divergence(base: torch.Tensor, other: torch.Tensor) -> FloatArray:
    """KL(base || other) of each token, nats: float64 [N] from logits [N, V]."""
    out = []
    for b, o in zip(base.split(256), other.split(256), strict=True):
        first, second = b.float().log_softmax(-1), o.float().log_softmax(-1)
        out.append((first.exp() * (first - second)).sum(-1).double().cpu())
    return torch.cat(out).numpy() if out else np.zeros(0)
