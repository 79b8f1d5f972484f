"""Perplexity on text, window by window, and the paired difference of two runs over the same windows.

    nll[i]     = mean over the scored tokens of window i of -log p(token | the tokens before it)      (nats)
    perplexity = exp( sum_i tokens[i] * nll[i] / sum_i tokens[i] )

The first token of a window has nothing before it and is not scored, nor is padding, nor a token that follows
padding. An encoder-decoder model is scored on every token of its target.

Cost: one forward pass. Logits stay in the model's dtype; log-softmax runs in float32 on a few rows at a time,
so float32 logits of a large vocabulary never exist whole (8 windows of 256 tokens and 150,000 words would be
1.2 GB).

N windows, B rows of a batch, W tokens of a window, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import stats
from torch.nn import functional

from equipoise.errors import InputError
from equipoise.evaluation.data import IGNORED
from equipoise.types import FloatArray, IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from equipoise.cli.console import Track

CHUNK_ELEMENTS = 2**22
"""Float32 logits held at once: 16 MiB."""


@dataclass(frozen=True, eq=False)
class TextResult:
    """Loss of each window, so that two runs can be paired.

    Attributes:
        nll: float64 [N], mean negative log-likelihood of the window's scored tokens, nats.
        tokens: int64 [N], scored tokens of the window.
        domains: N names.
    """

    nll: FloatArray
    tokens: IntArray
    domains: tuple[str, ...]

    @property
    def perplexity(self) -> float:
        """Exp of the mean loss of a token."""
        return float(np.exp(self.nll @ self.tokens / self.tokens.sum()))

    def by_domain(self) -> dict[str, TextResult]:
        """The same figures, a domain at a time, in the order in which domains first appear."""
        names = np.array(self.domains)
        return {
            name: TextResult(self.nll[names == name], self.tokens[names == name], (name,) * int((names == name).sum()))
            for name in dict.fromkeys(self.domains)
        }


@torch.inference_mode()
def evaluate_text(
    model: PreTrainedModel, batches: Sequence[Mapping[str, torch.Tensor]], track: Track | None = None
) -> TextResult:
    """Score every window.

    Args:
        model: decoder-only or encoder-decoder, in evaluation mode, on one device.
        batches: from `equipoise.evaluation.data.batches`, or dicts with the same keys (then the domain is
            "text").
        track: shows progress.

    Returns:
        One entry a window, in the order of the batches.

    Raises:
        InputError: there is not one token to score.
    """
    losses: list[torch.Tensor] = []
    counts: list[torch.Tensor] = []
    domains: list[str] = []
    for batch in track(batches, len(batches), "perplexity") if track else batches:
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
        logits = model(**inputs, use_cache=False).logits
        target = _targets(batch).to(logits.device)
        loss = _losses(logits[:, : target.shape[1]], target)
        scored = (target != IGNORED).sum(1)
        losses.append((loss / scored.clamp(min=1)).cpu())
        counts.append(scored.cpu())
        domains.extend(getattr(batch, "domains", ("text",) * len(target)))
    if not counts or not int(sum(c.sum() for c in counts)):
        raise InputError("fewer tokens than needed: no window has a token to score")
    return TextResult(torch.cat(losses).numpy(), torch.cat(counts).numpy().astype(np.int64), tuple(domains))


def paired_difference(
    before: TextResult, after: TextResult, *, relative: bool = True, confidence: float = 0.95
) -> tuple[float, tuple[float, float]]:
    """How much the perplexity changed, with an interval over windows.

    Perplexity is a function of ratio estimators, `A = sum_i t_i a_i / sum_i t_i` (t tokens, a and b the
    losses of a window). The interval is a paired t interval with n - 1 degrees of freedom on the linearised
    per-window terms (Cochran, Sampling Techniques, 1977, chapter 6)

        relative: D = A - B in nats,    u_i = t_i (a_i - b_i - D) / mean t,    then 100 (exp(D +- q se) - 1) %
        absolute: exp(A) - exp(B),      u_i = t_i (exp(A) (a_i - A) - exp(B) (b_i - B)) / mean t,      +- q se

    with `se = sd(u) / sqrt(n)`. It was chosen over the bootstrap because it needs no random numbers, costs
    nothing, is defined when nothing changed (both ends 0, where BCa divides by zero), and pairing leaves
    differences so small and many that the normal approximation holds. Windows count as independent;
    neighbours from one document are not quite, so read the interval as one over text of this kind.

    Args:
        before: N windows.
        after: the same windows, scored with the other model.
        relative: percent of the perplexity before; otherwise the difference of the perplexities.
        confidence: coverage of the interval.

    Returns:
        (difference, (low, high)); positive is worse. The ends are NaN for a single window, which
        shows no spread.

    Raises:
        InputError: the two runs are not over the same windows.
    """
    if before.domains != after.domains or not np.array_equal(before.tokens, after.tokens):
        raise InputError("the two runs are not over the same windows: score both models on the same batches")
    n = len(before.tokens)
    weight = before.tokens / before.tokens.mean()
    a, b = float(weight @ after.nll) / n, float(weight @ before.nll) / n
    if relative:
        delta = a - b
        terms = weight * (after.nll - before.nll - delta)
    else:
        delta = float(np.exp(a) - np.exp(b))
        terms = weight * (np.exp(a) * (after.nll - a) - np.exp(b) * (before.nll - b))
    half = half_width(terms, confidence)
    ends = (delta - half, delta, delta + half)
    low, delta, high = (100 * float(np.expm1(end)) for end in ends) if relative else ends
    return delta, (low, high)


def half_width(terms: FloatArray, confidence: float = 0.95) -> float:
    """Half of the t interval of the mean of n independent terms; NaN when n < 2.

    Args:
        terms: [n], in the unit of the result.
        confidence: coverage.
    """
    n = len(terms)
    if n < 2:
        return float("nan")
    error = float(np.std(terms, ddof=1)) / n**0.5
    return float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error


def _targets(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What each position is to predict, -100 where nothing is: [B, W - 1], or [B, W] with decoder labels."""
    if "decoder_input_ids" in batch:
        return batch["labels"]
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    return ids[:, 1:].masked_fill(~(mask[:, 1:] & mask[:, :-1]), IGNORED)


def _losses(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(target) of each row: float64 [B] from logits [B, W, V] of any dtype, target [B, W]."""
    step = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    out = torch.zeros(len(target), dtype=torch.float64, device=logits.device)
    for row, (scores, wanted) in enumerate(zip(logits, target, strict=True)):
        for start in range(0, len(wanted), step):
            part = slice(start, start + step)
            loss = functional.cross_entropy(scores[part].float(), wanted[part], reduction="none", ignore_index=IGNORED)
            out[row] += loss.double().sum()
    return out
