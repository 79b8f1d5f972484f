"""Which experts a token gets when its gate is undecided: load prices, a few rounds over the whole batch.

LASER (arXiv 2510.03293) keeps the top-k of a token whose gate is sure and, where the scores are flat, gives it the
least loaded of the experts that score nearly as well. Taken token by token that is sequential and depends on the
order of the batch. Here the batch decides at once, by the dual of "minimise the busiest slot":

    value[t, e]  p[t, e] / sum of the token's top-k p        p: the gate's scores as a distribution
    pool(t)      the top-k and, when their mass is at most `mass`, up to `extra` experts with
                 value[t, e] >= value[t, k-th] - gap
    token t      keeps its strongest expert, takes the k - 1 others of its pool with the largest value[t, e] - price[e]
    price[e]     += step * (load[e] / (slots[e] * target) - 1), at least 0, for `rounds` rounds

and the first round that meets the target wins, else the one with the least busy slot. The tokens that give up least
go first; with k <= 2 and the strongest kept, none gives up more than `gap`. With k = 1 the one expert is what may be
exchanged.

Deterministic. A batch in another order gets the same decision, token by token: prices are sums over the batch, and of
equal offers the better score is taken, of equal scores the one that comes first. As the load of the whole batch counts,
a prompt's routing looks at its later tokens too. On the CPU, and for batches of up to `HOST_ROWS` elsewhere, one
compiled call (`compiled`); for more rows elsewhere tensor operations: one sort of [T, E], and `rounds` passes over
[free tokens, pool] (`prices`).

T tokens, E experts (classes of the router), k experts a token selects, P = min(k + extra, E) places of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from equipoise.checks import whole, within
from equipoise.rerouting import compiled
from equipoise.rerouting.prices import count, exchange

FIRST_STEP = 0.2
"""Of the prices, where the gap is not less."""
HOST_ROWS = 4096
"""Up to so many rows an accelerator's batch is decided on the host: a copy of [T, C] and one compiled call, where
`rounds` rounds of some twenty operations each take as long as so many launches, however few the rows."""


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
            within(f"laser: {name}", getattr(self, name), low, high)
        for name in ("extra", "rounds", "keep"):
            whole(f"laser: {name}", getattr(self, name), 0, 1000)

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
    lowest = scores.masked_fill(out, 0).amin(-1, keepdim=True).clamp(max=0)
    positive = (scores - lowest).masked_fill(out, 0)
    return positive / positive.sum(-1, keepdim=True).clamp(min=1e-20)


def pools(p: torch.Tensor, index: torch.Tensor, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """The pool of each token: what the family chose, best first, then the others, best first.

    Args:
        p: float32 [T, E], rows a distribution.
        index: int64 [T, k], what the family chose.
        rule: of the layer.

    Returns:
        value float32 [T, P], -inf outside the pool, and expert int64 [T, P].
    """
    k = index.shape[1]
    order = p.sort(stable=True, dim=-1, descending=True).indices
    other = torch.ones_like(p, dtype=torch.uint8).scatter_(1, index, 0)
    order = order.gather(1, other.gather(1, order).sort(stable=True, dim=-1).indices)
    expert = order[:, : min(k + rule.extra, p.shape[1])]
    top = p.gather(1, expert)
    mass = top[:, :k].sum(-1, keepdim=True)
    value = top / mass.clamp(min=1e-20)
    kth, rest = value[:, k - 1 : k], value[:, k:]
    inside = (kth - rest <= rule.gap) & (rest > 0) & (mass <= rule.mass * p.sum(-1, keepdim=True))
    # A family that rules experts out by a score that others fall below (AXK2) may choose what p says it cannot.
    inside &= (rest <= kth).all(-1, keepdim=True)
    value[:, k:] = rest.masked_fill(~inside, -torch.inf)
    return value, expert


Vector = torch.Tensor | npt.NDArray[np.float32]
"""float32 [C] of a layer; where the batch is decided on the host, an array spares its conversion."""


def on_host(vector: Vector) -> npt.NDArray[np.float32]:
    """A vector as numpy has it."""
    return vector if isinstance(vector, np.ndarray) else vector.cpu().numpy()


@dataclass(slots=True, eq=False)
class Decision:
    """What was decided for a batch.

    Attributes:
        index: int64 [T, k]; a row that keeps its experts is the family's, also in order.
        rows_moved: bool [T].
        loads: float32 [C], selections of real rows.
        tokens: real rows.
        rerouted: how many of them moved.
        scores: [T, k] of the index, as they were given; None where they have yet to be read.
    """

    index: torch.Tensor
    rows_moved: torch.Tensor | npt.NDArray[np.bool_]
    loads: Vector
    tokens: int
    rerouted: int | torch.Tensor
    scores: torch.Tensor | None = None

    @property
    def moved(self) -> torch.Tensor:
        """`rows_moved`, on the device of the index."""
        return torch.as_tensor(self.rows_moved, device=self.index.device)

    @property
    def load(self) -> torch.Tensor:
        """`loads`, on the device of the index."""
        return torch.as_tensor(self.loads, device=self.index.device)


_ALL = np.empty(0, np.bool_)


def select(
    scores: torch.Tensor,
    index: torch.Tensor,
    rule: Rule,
    slots: Vector,
    before: Vector,
    real: torch.Tensor | None = None,
    *,
    logits: bool = False,
    experts: int = 0,
) -> Decision | None:
    """The experts of each token.

    Args:
        scores: [T, C] of any float dtype, what the family selects by; -inf or exactly 0 where it rules an expert out.
        index: int64 [T, k], what the family chose: the largest k of the scores.
        rule: of the layer.
        slots: float32 [C], what an expert's load is divided by; inf for a class that is no expert.
        before: float32 [C], load that counts beside this batch's, in tokens.
        real: bool [T], False for padding, which neither counts nor moves; None: all real.
        logits: the scores are logits.
        experts: E, where the router has classes that are no expert (ZAYA skips); they come last, and are neither given
            nor taken away. 0: all are.

    Returns:
        The decision, or None when a score that was chosen is NaN or infinite: topk and argmax take NaN for the
        largest, so what was chosen shows every one.
    """
    if not scores.is_cpu:
        where = select_on_host if len(scores) <= HOST_ROWS else select_tensors
        return where(scores, index, rule, slots, before, real, logits=logits, experts=experts)
    given = scores.dtype == torch.float32 and not scores.requires_grad
    if not given or not scores.is_contiguous():
        scores = scores.detach().float().contiguous()
    k = index.shape[1]
    own = scores.numpy()
    tokens, rerouted, chosen, held, moved, load = compiled.decide(
        own,
        scores.softmax(-1).numpy() if logits else own,
        index.contiguous().numpy(),
        _ALL if real is None else real.numpy(),
        on_host(slots),
        on_host(before),
        experts or scores.shape[1],
        rule.gap,
        rule.mass,
        rule.extra,
        0 if rule.keeps else rule.rounds,
        rule.target,
        min(rule.keep, k - 1),
        min(rule.gap, FIRST_STEP),
    )
    if tokens == compiled.NOT_FINITE:
        return None
    if not rerouted:
        return Decision(index, moved, load, tokens, 0)
    return Decision(torch.from_numpy(chosen), moved, load, tokens, rerouted, torch.from_numpy(held) if given else None)


def select_on_host(
    scores: torch.Tensor,
    index: torch.Tensor,
    rule: Rule,
    slots: Vector,
    before: Vector,
    real: torch.Tensor | None = None,
    *,
    logits: bool = False,
    experts: int = 0,
) -> Decision | None:
    """`select` of copies on the host; the decision is on the device of the scores again."""
    device = scores.device
    seen = None if real is None else real.cpu()
    found = select(scores.detach().cpu(), index.cpu(), rule, slots, before, seen, logits=logits, experts=experts)
    if found is not None:
        found.index = found.index.to(device) if found.rerouted else index
        found.scores = None
    return found


def select_tensors(
    scores: torch.Tensor,
    index: torch.Tensor,
    rule: Rule,
    slots: Vector,
    before: Vector,
    real: torch.Tensor | None = None,
    *,
    logits: bool = False,
    experts: int = 0,
) -> Decision | None:
    """`select` in tensor operations, on any device; this is what the compiled form has to agree with."""
    rows, k = index.shape
    chosen_scores = scores.gather(-1, index).isfinite().all(-1)
    if not bool((chosen_scores if real is None else chosen_scores | ~real).all()):
        return None
    slots, before = (torch.as_tensor(v, device=scores.device) for v in (slots, before))
    p = distribution(scores, logits)
    p[:, experts or p.shape[1] :] = 0
    size = p.shape[1]
    load = count(index, size, real)
    tokens = rows if real is None else int(real.sum())
    still = Decision(index, torch.zeros(rows, dtype=torch.bool, device=index.device), load, tokens, 0)
    if rule.keeps or tokens == 0 or k >= size:
        return still
    value, expert = pools(p, index, rule)
    free = value[:, k:].isfinite().any(-1)
    if real is not None:
        free &= real
    where = free.nonzero()[:, 0]
    if not len(where):
        return still
    keep = min(rule.keep, k - 1)
    value, expert = value[where], expert[where]
    # Load that no price changes: tokens that are sure, and the strongest expert of each of the others.
    fixed = load + before - count(expert[:, keep:k], size)
    pick = exchange(
        value[:, keep:], expert[:, keep:], k - keep, rule.rounds, rule.target, min(rule.gap, FIRST_STEP), slots, fixed
    )
    changed = (pick >= k - keep).any(-1)
    new = torch.cat([expert[:, :keep], expert[:, keep:].gather(1, pick)], 1)
    moved = still.moved.index_copy(0, where, changed)
    chosen = index.index_copy(0, where, torch.where(changed[:, None], new, index[where]))
    return Decision(chosen, moved, count(chosen, size, real), tokens, moved.sum())
