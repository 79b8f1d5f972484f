"""Which replicas move, given a forecast: the moves that gain most a moved slot, until a move no longer pays.

In a layer the best single move gives the busiest expert (largest F/r) a slot of the expert that misses it least
(smallest F/(r-1)); repeated, it ends at the water-filled placement. Along that path the largest predicted slot load
falls in steps; its concave hull cuts the path into chunks of falling gain a move. Chunks of all layers compete:
the best first, down to `price` (hysteresis) and within `budget` slots (migration).

Cost: O(R (E + R)) a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from equipoise.planning.replicas import replica_counts
from equipoise.types import FloatArray, IntArray

Spare: TypeAlias = "int | IntArray"
"""Spare slots of each layer: one number for all, or int [L]."""


def place(load: FloatArray, spare: Spare) -> IntArray:
    """Water-filled slots of each expert.

    Args:
        load: [..., L, E] loads.
        spare: spare slots of each layer.

    Returns:
        int64 [..., L, E].
    """
    if isinstance(spare, (int, np.integer)):
        return replica_counts(load, int(spare))
    return np.stack([replica_counts(load[..., row, :], int(r)) for row, r in enumerate(spare)], axis=-2)


def moved_slots(before: IntArray, after: IntArray) -> IntArray:
    """Slots whose expert changes, by the expert they get: [..., E]."""
    return np.maximum(np.asarray(after) - before, 0)


def transfers(load: FloatArray, slots: IntArray) -> tuple[FloatArray, IntArray]:
    """The greedy path from `slots` to the best placement of as many slots.

    Args:
        load: [E] forecast.
        slots: int [E], at least 1.

    Returns:
        level: float64 [K + 1]; the largest slot load after each transfer, never rising.
        moves: int64 [K, 2]; (expert that gets a slot, expert that loses one).
    """
    r = slots.astype(np.float64)
    level, moves = [float((load / r).max())], []
    for _ in range(int(r.sum()) - len(r)):
        taker = int((load / r).argmax())
        left = np.where(r > 1, load / np.maximum(r - 1, 1), np.inf)
        left[taker] = np.inf
        giver = int(left.argmin())
        if not left[giver] < level[-1]:
            break
        r[taker] += 1
        r[giver] -= 1
        moves.append((taker, giver))
        level.append(float((load / r).max()))
    return np.array(level), np.array(moves, dtype=np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class _Chunk:
    gain: float
    layer: int
    moves: IntArray


def migrate(forecast: FloatArray, slots: IntArray, price: float = 0.0, budget: float = np.inf) -> IntArray:
    """New slots of each expert, as good for the forecast as moves that pay allow.

    Args:
        forecast: [L, E] loads.
        slots: int [L, E] slots of each expert now.
        price: least gain of a move: fall of the layer's largest slot load for moving all its spare slots, as a
            share of the best reachable largest load, mean over layers (0.3: moving a tenth must bring 3 % of it).
        budget: most slots to move in all layers together.

    Returns:
        int64 [L, E], each layer with as many slots as before.
    """
    after = slots.astype(np.int64, copy=True)
    chunks: list[_Chunk] = []
    paths = [transfers(load, now) for load, now in zip(forecast, slots, strict=True)]
    # LIS is averaged over layers as it is, so what a move gains counts alike in all of them.
    scale = float(np.mean([level[-1] for level, _ in paths]))
    for layer, ((level, moves), now) in enumerate(zip(paths, slots, strict=True)):
        spare, start = int(now.sum()) - len(now), 0
        while start < len(moves):
            fall = level[start] - level[start + 1 :]
            gain = fall / (scale * np.arange(1, len(fall) + 1) / spare)
            end = start + 1 + int(gain.argmax())
            if gain.max() <= 0 or gain.max() < price:
                break
            chunks.append(_Chunk(float(gain.max()), layer, moves[start:end]))
            start = end
    # Stable, and gains fall along a layer's hull: a chunk never comes before the one it builds on.
    left = budget
    for chunk in sorted(chunks, key=lambda c: -c.gain):
        if len(chunk.moves) > left:
            break
        for taker, giver in chunk.moves:
            after[chunk.layer, taker] += 1
            after[chunk.layer, giver] -= 1
        left -= len(chunk.moves)
    return after
