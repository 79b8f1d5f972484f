"""Prices: which of the experts of its pool each token takes, so that the busiest slot is least.

    token t     takes the n experts of its pool with the largest value[t, e] - price[e]
    price[e]    += step * (load[e] / (slots[e] * target * mean load) - 1), at least 0

Projected subgradient on the dual of the assignment's linear program, `rounds` steps, from the family's own choice on;
the round with the least busy slot wins. On the CPU a compiled loop, elsewhere tensor operations; both give the same.

F tokens that are free to choose, P places of a pool, E experts, n experts to take.
"""

from __future__ import annotations

import numpy as np
import torch

from equipoise.planning.kernels import compiled

DECAY = 0.85
"""Of the steps: 20 rounds end at 5 % of the first. docs/experiments.md has the distance to the optimum."""
HIGHEST = 2.0
"""Price at which every token that can leave does: values are at most 1."""


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
    """Prices: n experts of each pool, so that the busiest slot is least.

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
        int64 [F, n], places in the pool.
    """
    per_slot = (fixed.sum() + value.shape[0] * n) / slots[slots.isfinite()].sum() * target
    if value.device.type == "cpu":
        values, experts, widths, loads = (x.detach().contiguous().numpy() for x in (value, expert, slots, fixed))
        return torch.from_numpy(
            _exchange(values, experts, widths, loads, n, rounds, np.float32(per_slot.item()), first)
        )
    return exchange_tensors(value, expert, n, rounds, per_slot, first, slots, fixed)


def exchange_tensors(
    value: torch.Tensor,
    expert: torch.Tensor,
    n: int,
    rounds: int,
    per_slot: torch.Tensor,
    first: float,
    slots: torch.Tensor,
    fixed: torch.Tensor,
) -> torch.Tensor:
    """`exchange` in tensor operations, without a copy to the host; per_slot is the load that counts as 1."""
    size = len(slots)
    best = torch.arange(n, device=value.device).expand(value.shape[0], n)
    price = torch.zeros_like(fixed)
    load = (fixed + count(expert[:, :n], size)) / slots / per_slot
    least = load.max()
    step = first
    for _ in range(rounds):
        price = (price + step * (load - 1)).clamp(0, HIGHEST)
        step *= DECAY
        offer = value - price[expert]
        pick = offer.argmax(-1, keepdim=True) if n == 1 else offer.topk(n, -1).indices
        load = (fixed + count(expert.gather(1, pick), size)) / slots / per_slot
        busiest = load.max()
        best = torch.where(busiest < least, pick, best)
        least = torch.minimum(least, busiest)
    return best


@compiled
def _exchange(
    value: np.ndarray,
    expert: np.ndarray,
    slots: np.ndarray,
    fixed: np.ndarray,
    n: int,
    rounds: int,
    per_slot: np.float32,
    first: float,
) -> np.ndarray:
    """`exchange` as loops: the same arithmetic in the same order, without the overhead of a tensor operation."""
    rows, places = value.shape
    pick = np.empty((rows, n), np.int64)
    best = np.empty((rows, n), np.int64)
    load = np.empty(len(slots), np.float32)
    price = np.zeros(len(slots), np.float32)
    offer = np.empty(places, np.float32)
    least = np.float32(np.inf)
    step = first
    for r in range(rounds + 1):
        load[:] = fixed
        for t in range(rows):
            for j in range(places):
                offer[j] = value[t, j] - price[expert[t, j]]
            for i in range(n):
                top = i if r == 0 else 0
                for j in range(0 if r else places, places):
                    if offer[j] > offer[top]:
                        top = j
                pick[t, i] = top
                offer[top] = -np.inf
                load[expert[t, top]] += np.float32(1)
        busiest = np.float32(0)
        for e in range(len(slots)):
            load[e] = load[e] / slots[e] / per_slot
            busiest = max(busiest, load[e])
        if busiest < least:
            least = busiest
            best[:] = pick
        for e in range(len(slots)):
            moved = price[e] + np.float32(step) * (load[e] - np.float32(1))
            price[e] = min(max(moved, np.float32(0)), np.float32(HIGHEST))
        step *= DECAY
    return best


def count(index: torch.Tensor, size: int, real: torch.Tensor | None = None) -> torch.Tensor:
    """Selections of each expert, float32 [size], from int64 [T, k]; rows that are not real do not count."""
    one = torch.ones_like(index, dtype=torch.float32)
    if real is not None:
        one = one * real[:, None]
    return torch.zeros(size, dtype=torch.float32, device=index.device).scatter_add_(
        0, index.reshape(-1), one.reshape(-1)
    )
