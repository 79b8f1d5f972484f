"""Prices: which of the experts of its pool each token takes, so that the busiest slot is least.

    token t     takes the n experts of its pool with the largest value[t, e] - price[e]
    price[e]    += step * (load[e] / (slots[e] * target * mean load) - 1), at least 0

Projected subgradient on the dual of the assignment's linear program, at most `rounds` steps, from the family's own
choice on; the first round that meets the target wins, else the one with the least busy slot.

F tokens that are free to choose, P places of a pool, E experts, n experts to take.
"""

from __future__ import annotations

import torch

from equipoise.rerouting.compiled import DECAY, HIGHEST


def exchange(
    value: torch.Tensor,
    expert: torch.Tensor,
    n: int,
    rounds: int,
    target: float,
    first: float,
    slots: torch.Tensor,
    fixed: torch.Tensor,
) -> torch.Tensor:
    """Prices: n experts of each pool, so that the busiest slot is least. No copy to the host.

    Args:
        value: float32 [F, P'], best first, -inf outside the pool.
        expert: int64 [F, P'].
        n: how many to take of each row; the first n are what the family chose.
        rounds: of prices.
        target: load of the busiest slot, in mean loads, below which nothing moves.
        first: step of the first round.
        slots: float32 [E].
        fixed: float32 [E], load that is not decided here.

    Returns:
        int64 [F, n], places in the pool, ascending.
    """
    size = len(slots)
    per_slot = (fixed.sum() + value.shape[0] * n) / slots[slots.isfinite()].sum() * target
    best = torch.arange(n, device=value.device).expand(value.shape[0], n)
    price = torch.zeros_like(fixed)
    load = (fixed + count(expert[:, :n], size)) / slots / per_slot
    least = load.max()
    step = first
    for _ in range(rounds):
        price = (price + step * (load - 1)).clamp(0, HIGHEST)
        step *= DECAY
        offer = value - price[expert]
        # A stable sort, so that of equal offers the better score is taken.
        pick = offer.sort(stable=True, dim=-1, descending=True).indices[:, :n]
        load = (fixed + count(expert.gather(1, pick), size)) / slots / per_slot
        busiest = load.max()
        best = torch.where((busiest < least) & (least > 1), pick, best)
        least = torch.where(least > 1, torch.minimum(least, busiest), least)
    return best.sort(-1).values


def count(index: torch.Tensor, size: int, real: torch.Tensor | None = None) -> torch.Tensor:
    """Selections of each expert, float32 [size], from int64 [T, k]; rows that are not real do not count."""
    one = torch.ones_like(index, dtype=torch.float32)
    if real is not None:
        one = one * real[:, None]
    return torch.zeros(size, dtype=torch.float32, device=index.device).scatter_add_(
        0, index.reshape(-1), one.reshape(-1)
    )
