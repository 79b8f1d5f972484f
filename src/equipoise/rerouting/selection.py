"""Which experts a token gets when its gate is undecided: load prices, a few rounds over the whole batch.

LASER (arXiv 2510.03293) keeps the top-k of a token whose gate is sure and, where the scores are flat, gives it the
least loaded of the experts that score nearly as well. Taken token by token that is sequential and depends on the
order of the batch. Here the batch decides at once, by the dual of "minimise the busiest slot":

    value[t, e]  p[t, e] / sum of the token's top-k p        p: the gate's scores as a distribution
    pool(t)      the top-k and, when their mass is at most `mass`, up to `extra` experts with
                 value[t, e] >= value[t, k-th] - gap
    token t      keeps its strongest expert, takes the k - 1 others of its pool with the largest value[t, e] - price[e]
    price[e]     += step * (load[e] / (slots[e] * target) - 1), at least 0, for `rounds` rounds

and the round with the least busy slot wins. The tokens that give up least go first; with k <= 2 none gives up more
than `gap`. With k = 1 the one expert is what may be exchanged.

Deterministic. A batch in another order gets the same decision, token by token: prices are sums over the batch, and
equal values go to the expert that `torch.topk` names first. As the load of the whole batch counts, a prompt's
routing looks at its later tokens too. Cost: one topk of [T, E], and `rounds` passes over
[free tokens, pool] (`prices`).

T tokens, E experts (classes of the router), k experts a token selects, P = min(k + extra, E) places of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from equipoise.errors import InputError
from equipoise.rerouting.prices import count, exchange

FIRST_STEP = 0.2
"""Of the prices, where the gap is not less."""


@dataclass(frozen=True)
class Rule:
    """When a token of one layer may leave its top-k, and for what.

    Attributes:
        gap: how far below the k-th an expert may score, as a share of the mass of the top-k; 0 keeps the top-k always.
        mass: the top-k is kept when it holds more than this share of the gate's mass.
        extra: most experts a pool has beside the top-k.
        rounds: of prices.
        target: load of the busiest slot, in mean loads, below which nothing moves.
        keep: a token's strongest experts that it never gives up (of k, at most k - 1).
    """

    gap: float = 0.0
    mass: float = 1.0
    extra: int = 4
    rounds: int = 20
    target: float = 1.0
    keep: int = 1

    def __post_init__(self) -> None:
        for name, low, high in (("gap", 0, 1), ("mass", 0, 1), ("target", 0.5, 1e6)):
            if not low <= getattr(self, name) <= high:
                raise InputError(f"laser: {name} must be in [{low}, {high:g}], got {getattr(self, name)}")
        for name in ("extra", "rounds", "keep"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 1000:
                raise InputError(f"laser: {name} must be a whole number in [0, 1000], got {value!r}")

    @property
    def keeps(self) -> bool:
        """True when the rule never leaves the top-k."""
        return self.gap == 0 or self.extra == 0 or self.rounds == 0 or self.mass == 0


def distribution(scores: torch.Tensor, logits: bool) -> torch.Tensor:
    """The scores that the family selects by, as a distribution over its experts.

    Args:
        scores: [T, E]; -inf or exactly 0 where the family rules an expert out (group-limited selection).
        logits: they are logits; otherwise probabilities or sigmoids, a selection bias added where there is one.

    Returns:
        float32 [T, E], at least 0; 0 where ruled out. Rows sum to 1 (0 when no score is above 0).
    """
    scores = scores.float()
    if logits:
        return scores.softmax(-1)
    out = scores.isneginf() | (scores == 0)
    # A bias may take scores below 0: then all of the token's scores move up by the same, which keeps their gaps.
    lowest = scores.masked_fill(out, 0).amin(-1, keepdim=True)
    positive = (scores - lowest).masked_fill(out, 0)
    return positive / positive.sum(-1, keepdim=True).clamp(min=1e-20)


def pools(p: torch.Tensor, k: int, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """The pool of each token, best first; the first k are its top-k.

    Args:
        p: float32 [T, E], rows a distribution.
        k: experts a token selects.
        rule: of the layer.

    Returns:
        value float32 [T, P], -inf outside the pool, and expert int64 [T, P].
    """
    top, expert = p.topk(min(k + rule.extra, p.shape[1]), -1)
    mass = top[:, :k].sum(-1, keepdim=True)
    value = top / mass.clamp(min=1e-20)
    rest = value[:, k:]
    inside = (value[:, k - 1 : k] - rest <= rule.gap) & (rest > 0) & (mass <= rule.mass * p.sum(-1, keepdim=True))
    value[:, k:] = rest.masked_fill(~inside, -torch.inf)
    return value, expert


def select(
    p: torch.Tensor,
    index: torch.Tensor,
    rule: Rule,
    slots: torch.Tensor,
    before: torch.Tensor,
    real: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token.

    Args:
        p: float32 [T, E], rows a distribution over what the family lets the token choose from.
        index: int64 [T, k], what the family chose: the largest k of p.
        rule: of the layer.
        slots: float32 [E], what an expert's load is divided by; inf for a class that is no expert.
        before: float32 [E], load that counts beside this batch's, in tokens.
        real: bool [T], False for padding, which neither counts nor moves; None: all real.

    Returns:
        index int64 [T, k] (a row that keeps its experts is the family's, also in order) and moved bool [T].
    """
    tokens, k = index.shape
    moved = torch.zeros(tokens, dtype=torch.bool, device=index.device)
    if rule.keeps or tokens == 0 or k >= p.shape[1]:
        return index, moved
    value, expert = pools(p, k, rule)
    # A family that rules experts out by a score that others fall below (AXK2) may choose what p says it cannot.
    free = value[:, k:].isfinite().any(-1) & (p.gather(1, index).amin(-1) >= p.gather(1, expert[:, k - 1 : k])[:, 0])
    if real is not None:
        free &= real
    rows = free.nonzero()[:, 0]
    if not len(rows):
        return index, moved
    keep = min(rule.keep, k - 1)
    own = count(index, p.shape[1], real).to(p.dtype) + before
    value, expert = value[rows], expert[rows]
    # Load that no price changes: tokens that are sure, and the strongest expert of each of the others.
    fixed = own - count(expert[:, keep:k], p.shape[1])
    pick = exchange(
        value[:, keep:], expert[:, keep:], k - keep, rule.rounds, rule.target, min(rule.gap, FIRST_STEP), slots, fixed
    )
    changed = (pick >= k - keep).any(-1)
    chosen = torch.cat([expert[:, :keep], expert[:, keep:].gather(1, pick)], 1)
    moved[rows] = changed
    return index.index_copy(0, rows, torch.where(changed[:, None], chosen, index[rows])), moved
