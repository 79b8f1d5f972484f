"""Which slot a token goes to: even, deterministic, a pure function of the batch.

The i-th selection of expert e in the batch (row order, then the order of its top-k) goes to slot
`pattern[e][i mod len(pattern[e])]`. With even shares the pattern is the expert's slots in turn, original
precision first, so a batch's loads differ by at most one token between the slots of an expert and a single
token meets the original weights. Unequal shares are rounded to q[s] = whole[s] / period, period at most 256, and
laid out so that after any n tokens every slot has within one token of n * q[s]: token j of a slot falls between
positions (j - 1) / q and j / q, earliest deadline first, as in proportionate fair scheduling (Baruah et al.,
Algorithmica 15, 1996; one processor, where the rule always succeeds).

No state is kept between batches: the same batch always gives the same result, on every rank alike.
"""

from __future__ import annotations

import numpy as np
import torch

from equipoise.runtime.kernels.rows import count_by_slot, sort_by_slot
from equipoise.types import LayerPlan

LONGEST = 256
"""Entries of the longest pattern: shares are met to a token in so many, and small fractions exactly."""


def share_pattern(shares: np.ndarray) -> np.ndarray:
    """Order in which the slots of one expert take its tokens.

    Args:
        shares: [r], summing to 1.

    Returns:
        int64 [period], entries 0..r-1; the period is r when the shares are even, else at most `LONGEST` (r if r is
        more).
    """
    r = len(shares)
    if np.allclose(shares, 1 / r):
        return np.arange(r, dtype=np.int64)
    whole = _whole_shares(shares)
    period = int(whole.sum())
    taken = np.zeros(r, dtype=np.int64)
    pattern = np.empty(period, dtype=np.int64)
    never = np.iinfo(np.int64).max
    for i in range(period):
        due = np.full(r, never)
        begun = taken * period < whole * (i + 1)
        due[begun] = -(-(taken[begun] + 1) * period // whole[begun])
        pattern[i] = int(due.argmin())
        taken[pattern[i]] += 1
    return pattern


def _whole_shares(shares: np.ndarray) -> np.ndarray:
    """Tokens of each slot in one period, int64 [r]: the nearest fractions of a period of at most `LONGEST`."""
    periods = np.arange(1, max(LONGEST, len(shares)) + 1)
    quota = periods[:, None] * shares
    whole = np.floor(quota).astype(np.int64)
    # What is left of each period goes to the largest remainders.
    place = np.argsort(np.argsort(whole - quota, axis=1, kind="stable"), axis=1)
    whole += place < (periods - whole.sum(1))[:, None]
    # Rounded, so that of all periods that meet the shares exactly the shortest is taken.
    error = np.abs(whole / periods[:, None] - shares).max(1).round(9)
    return whole[int(error.argmin())]


class SlotTable:
    """Expert -> slots of one layer, as tensors that follow the batch's device.

    Attributes:
        num_experts: E.
        num_slots: S.
        precision: precision of each slot.
        pool_index: place of each slot in the pool of its precision.
        pools: slots of each precision, in order; `original` is the first.
        firsts: place of each pool's first slot in the order of the pools.
    """

    def __init__(self, layer: LayerPlan) -> None:
        self.layer = layer
        self.num_experts = layer.num_experts
        self.num_slots = len(layer.slots)
        self.precision = [slot.precision for slot in layer.slots]
        self.pools: dict[str, list[int]] = {}
        self.pool_index = []
        for s, name in enumerate(self.precision):
            pool = self.pools.setdefault(name, [])
            self.pool_index.append(len(pool))
            pool.append(s)
        # `original` first: torch's grouped product (`kernels.grouped`) computes rows from the first on.
        self.pools = dict(sorted(self.pools.items(), key=lambda item: item[0] != "original"))
        # Slots in the order of the pools, then the sentinel: rows sorted so are together by precision.
        self._in_order = np.array([s for pool in self.pools.values() for s in pool] + [self.num_slots])
        self._position = np.argsort(self._in_order)
        self.firsts = {name: int(self._position[pool[0]]) for name, pool in self.pools.items()}
        by_expert: list[list[int]] = [[] for _ in range(layer.num_experts)]
        for s, slot in enumerate(layer.slots):
            by_expert[slot.expert].append(s)
        self._set_patterns(
            [np.array(slots)[share_pattern(np.array([layer.slots[s].share for s in slots]))] for slots in by_expert]
        )

    def _set_patterns(self, patterns: list[np.ndarray]) -> None:
        """Take the order in which each expert's slots get its tokens."""
        lengths = [len(p) for p in patterns]
        # One entry more: dropped selections (expert E) read a pattern of length 1 that is the sentinel slot S.
        # numpy, because a skeleton is built under `torch.device("meta")`, where a new tensor would have no data.
        self._arrays = (
            np.array([*lengths, 1]),
            np.concatenate([[0], np.cumsum(lengths)]),
            np.concatenate([*patterns, [self.num_slots]]),
        )
        self._on: dict[torch.device, tuple[torch.Tensor, ...]] = {}

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """What `rows.sort_by_slot` reads: length, offset, pattern, position."""
        return *self._arrays, self._position

    def _tensors(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        if device not in self._on:
            self._on[device] = tuple(
                torch.from_numpy(a).to(device) for a in (*self._arrays, self._position, self._in_order)
            )
        return self._on[device]

    def patterns(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `assign` reads: length and offset int64 [E + 1] of the experts' slots in the pattern."""
        return self._tensors(device)[:3]  # type: ignore[return-value]

    def positions(self, device: torch.device) -> torch.Tensor:
        """Place of each slot, and of the sentinel, in the order of the pools: int64 [S + 1]."""
        return self._tensors(device)[3]

    def in_order(self, device: torch.device) -> torch.Tensor:
        """The slots in the order of the pools, the sentinel last: int64 [S + 1]."""
        return self._tensors(device)[4]

    def __deepcopy__(self, memo: dict[int, object]) -> SlotTable:
        twin = SlotTable(self.layer)
        twin._arrays = self._arrays
        return twin

    def largest_shares(self) -> np.ndarray:
        """What part of an expert's tokens its busiest slot takes, now: float64 [E]."""
        length, offset, pattern = self._arrays
        parts = [pattern[o : o + n] for o, n in zip(offset[:-1], length[:-1], strict=True)]
        return np.array([np.unique(part, return_counts=True)[1].max() / len(part) for part in parts])

    def rerouted(self, by_expert: list[list[int]]) -> SlotTable:
        """A table over the same storage in which other slots serve an expert, each an even share.

        Args:
            by_expert: slots of each expert, at least one, in the order in which they take its tokens. A slot that is
                named nowhere serves nobody.
        """
        twin = SlotTable(self.layer)
        twin._set_patterns([np.array(slots, dtype=np.int64) for slots in by_expert])
        return twin

    def sort(self, index: torch.Tensor) -> tuple[torch.Tensor, np.ndarray, list[int]]:
        """Rows of a batch on the CPU, sorted by slot in the order of the pools; the same assignment as `assign`.

        Args:
            index: int64 [T, k] experts; E marks a dropped selection.

        Returns:
            tokens int64 [T*k], kept rows first; place int64 [T*k] of each selection among the rows, -1 when dropped;
            rows of each slot, in the order of the pools.
        """
        flat = index.reshape(-1).numpy()
        tokens, place = np.empty(len(flat), np.int64), np.empty(len(flat), np.int64)
        counts = np.empty(self.num_slots + 1, np.int64)
        sort_by_slot(flat, *self.arrays, tokens, place, counts, index.shape[1])
        return torch.from_numpy(tokens), place, counts[:-1].tolist()

    def count(self, index: torch.Tensor, real: torch.Tensor | None, experts: np.ndarray, slots: np.ndarray) -> None:
        """Count a batch on the CPU; the same assignment as `assign`.

        Args:
            index: int64 [T, k] experts; E marks a dropped selection.
            real: bool [T], tokens that count; None: all of them.
            experts: int64 [E + 1], added to; the last entry takes what was dropped.
            slots: int64 [S + 1], added to, likewise.
        """
        flat = index.reshape(-1).numpy()
        counted = np.empty(0, np.bool_) if real is None else real.contiguous().numpy()
        count_by_slot(flat, *self._arrays, counted, index.shape[1], experts, slots)

    def assign(self, index: torch.Tensor) -> torch.Tensor:
        """Slot of each selection.

        Args:
            index: int64 [T, k] experts; E marks a dropped selection.

        Returns:
            int64 [T, k] slots; S where the selection was dropped.
        """
        experts = index.reshape(-1)
        length, offset, pattern = self.patterns(experts.device)
        if self.num_slots == self.num_experts:
            return pattern[offset[experts]].reshape(index.shape)
        order = torch.argsort(experts, stable=True)
        count = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=experts.device)
        count.scatter_add_(0, experts, torch.ones_like(experts))
        start = torch.cumsum(count, 0) - count
        rank = torch.empty_like(experts)
        rank[order] = torch.arange(len(experts), device=experts.device) - start[experts[order]]
        return pattern[offset[experts] + rank % length[experts]].reshape(index.shape)
