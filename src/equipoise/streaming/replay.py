"""Replay a stream through the policies, window by window, each deciding before it sees the window.

    score of a step   mean over layers of E * max_e (n[e] / slots[e]) / sum n      LIS with replicas, even shares
    moved             slots whose expert changed since the step before; bytes of those slots

The first window is what every policy first places by; it is not scored, so a stream of N windows has N - 1 steps.
That first placement fills empty slots and is not a move. Layers without load in a step are left out of its mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from equipoise.errors import InputError
from equipoise.planning.replicas import replica_counts
from equipoise.streaming.moves import moved_slots
from equipoise.streaming.options import AdaptiveOptions
from equipoise.streaming.policies import POLICIES, Policy, make_policy
from equipoise.types import FloatArray, IntArray


@dataclass(frozen=True)
class Step:
    """One step of a replay, by policy name.

    Attributes:
        number: 1 for the second window, which is the first that is scored.
        lis: mean over layers.
        moves: slots whose expert changed.
        moved_bytes: bytes of those slots.
    """

    number: int
    lis: dict[str, float]
    moves: dict[str, int]
    moved_bytes: dict[str, int]


@dataclass
class Replay:
    """What a replay came to; filled while it runs."""

    policies: tuple[str, ...]
    steps: list[Step] = field(default_factory=list)

    def lis(self) -> dict[str, float]:
        """Mean LIS over the steps, by policy."""
        return {name: float(np.mean([step.lis[name] for step in self.steps])) for name in self.policies}

    def moves(self) -> dict[str, int]:
        """Slots moved over the whole stream, by policy."""
        return {name: sum(step.moves[name] for step in self.steps) for name in self.policies}

    def moved_bytes(self) -> dict[str, int]:
        """Bytes moved over the whole stream, by policy."""
        return {name: sum(step.moved_bytes[name] for step in self.steps) for name in self.policies}

    def summary(self) -> dict[str, object]:
        """The last line of `equipoise stream`."""
        return {
            "lis": self.lis(),
            "moves": self.moves(),
            "moved_bytes": self.moved_bytes(),
            "steps": len(self.steps),
        }


def step_lis(counts: FloatArray, slots: IntArray) -> float:
    """Mean over layers with load of LIS with replicas, loads shared evenly: counts, slots [L, E]."""
    total = counts.sum(-1)
    heard = total > 0
    if not heard.any():
        return 1.0
    top = (counts / slots).max(-1)
    return float((counts.shape[-1] * top[heard] / total[heard]).mean())


def replay(
    parts: FloatArray,
    spare: int,
    policies: Sequence[str] = POLICIES,
    options: AdaptiveOptions | None = None,
    slot_bytes: IntArray | None = None,
) -> Iterator[Step]:
    """Yield the steps of a stream.

    Args:
        parts: [N, P, L, E] selections in each part of each window, N at least 2.
        spare: R, spare slots of each layer.
        policies: names of `policies.POLICIES`.
        options: of the adaptive policy.
        slot_bytes: int [L, E] bytes of a slot; None counts 1 for each.

    Raises:
        InputError: a name is not a policy, the stream is too short, or counts are not finite and at least 0.
    """
    check_parts(parts)
    if len(parts) < 2:
        raise InputError(f"a stream needs at least 2 windows, this one has {len(parts)}")
    size = np.ones(parts.shape[2:], dtype=np.int64) if slot_bytes is None else slot_bytes
    if size.shape != parts.shape[2:]:
        raise InputError(f"slot bytes have shape {size.shape}, the stream has layers x experts {parts.shape[2:]}")
    return follow(parts, spare, policies, options, size)


def follow(
    windows: Iterable[FloatArray],
    spare: int,
    policies: Sequence[str] = POLICIES,
    options: AdaptiveOptions | None = None,
    slot_bytes: IntArray | None = None,
) -> Iterator[Step]:
    """As `replay`, of windows that come one by one (a model that runs): a step for each window but the first.

    Args:
        windows: of [P, L, E] selections each.
        spare: R, spare slots of each layer.
        policies: names of `policies.POLICIES`.
        options: of the adaptive policy.
        slot_bytes: int [L, E] bytes of a slot; None counts 1 for each.

    Raises:
        InputError: a name is not a policy, or R is negative. Nothing was taken from `windows` then.
    """
    if spare < 0:
        raise InputError(f"replicas must not be negative, got {spare}")
    most = None if slot_bytes is None else int(slot_bytes.max())
    deciders = {name: make_policy(name, spare, options, most or 1) for name in dict.fromkeys(policies)}
    return _steps(iter(windows), spare, deciders, slot_bytes)


def _steps(
    windows: Iterator[FloatArray], spare: int, deciders: dict[str, Policy | None], slot_bytes: IntArray | None
) -> Iterator[Step]:
    before: dict[str, IntArray] = {}
    last = next(windows, None)
    if last is None:
        return
    size = np.ones(last.shape[1:], dtype=np.int64) if slot_bytes is None else slot_bytes
    for t, parts in enumerate(windows, start=1):
        window = parts.sum(0)
        lis, moves, moved_bytes = {}, {}, {}
        for name, policy in deciders.items():
            if policy is None:
                slots = replica_counts(window, spare)
                before.setdefault(name, replica_counts(last.sum(0), spare))
            else:
                policy.observe(last)
                slots = policy.decide()
            moved = moved_slots(before.get(name, slots), slots)
            before[name] = slots
            lis[name] = step_lis(window, slots)
            moves[name] = int(moved.sum())
            moved_bytes[name] = int((moved * size).sum())
        last = parts
        yield Step(t, lis, moves, moved_bytes)


def check_parts(parts: FloatArray) -> None:
    """Refuse a stream that is not [N, P, L, E] finite counts.

    Raises:
        InputError: naming what is wrong.
    """
    if parts.ndim != 4 or 0 in parts.shape[1:]:
        raise InputError(f"a stream has shape {parts.shape}; [windows, parts, layers, experts] is needed, none empty")
    if parts.dtype.kind not in "iuf" or not np.isfinite(parts).all() or (parts.size and parts.min() < 0):
        raise InputError("a stream holds selections: numbers from 0, neither NaN nor inf")
