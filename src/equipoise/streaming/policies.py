"""Who decides the replicas of each step, and from what.

Every policy sees the same: a window that is over (`observe`), then it says how many slots each expert gets in the
next (`decide`). None sees the window it decides for, save `oracle`, which is the bound and not a policy.

    raw       no replicas
    static    water-filled by the first window, never changed
    long      water-filled by the sum of all windows so far         R&Q streaming option 1 (arXiv 2602.19938)
    short     water-filled by the last window                       R&Q streaming option 2
    adaptive  forecast from many horizons, moves that pay           `forecast`, `moves`
    oracle    water-filled by the window itself: the best any placement of as many slots can do
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from equipoise.errors import InputError
from equipoise.streaming.forecast import Forecaster
from equipoise.streaming.moves import Spare, migrate, moved_slots, place
from equipoise.streaming.options import AdaptiveOptions
from equipoise.types import FloatArray, IntArray


class Policy(Protocol):
    """Decides replicas window by window."""

    def observe(self, parts: FloatArray) -> None:
        """Learn from a window that is over: [P, L, E] selections in each of its parts, in order."""
        ...

    def decide(self) -> IntArray:
        """Slots of each expert for the next window: int64 [L, E]."""
        ...


class Raw:
    """The model as it is."""

    def observe(self, parts: FloatArray) -> None:
        """See `Policy`."""
        self._slots = np.ones(parts.shape[1:], dtype=np.int64)

    def decide(self) -> IntArray:
        """See `Policy`."""
        return self._slots


class Filled:
    """Water-filling of loads that decay by `memory` a window: 1 is `long`, 0 is `short`."""

    def __init__(self, spare: Spare, memory: float) -> None:
        self._spare, self._memory = spare, memory
        self._load: FloatArray | float = 0.0

    def observe(self, parts: FloatArray) -> None:
        """See `Policy`."""
        self._load = self._load * self._memory + parts.sum(0)

    def decide(self) -> IntArray:
        """See `Policy`."""
        return place(np.asarray(self._load), self._spare)


class Static:
    """Water-filling of the first window, kept."""

    def __init__(self, spare: Spare) -> None:
        self._spare = spare
        self._slots: IntArray | None = None

    def observe(self, parts: FloatArray) -> None:
        """See `Policy`."""
        if self._slots is None:
            self._slots = place(parts.sum(0), self._spare)

    def decide(self) -> IntArray:
        """See `Policy`."""
        assert self._slots is not None, "observe a window first"
        return self._slots


class Adaptive:
    """Blended forecast, and only the moves that pay.

    Args:
        spare: R, spare slots of each layer, or int [L].
        options: how to forecast and when to move.
        slot_bytes: bytes of one moved slot (for `options.move_bytes`): the largest, where they differ.
        slots: int [L, E] replicas in place already (None: the first window places them).
    """

    def __init__(
        self,
        spare: Spare,
        options: AdaptiveOptions | None = None,
        slot_bytes: int | None = None,
        slots: IntArray | None = None,
    ) -> None:
        self.options = options or AdaptiveOptions()
        if self.options.move_bytes is not None and not slot_bytes:
            raise InputError("move_bytes needs the bytes of a slot: give slot_bytes")
        self.forecaster = Forecaster(spare, self.options)
        self._spare, self._slot_bytes = spare, slot_bytes
        self._slots = slots
        self._last: IntArray | None = None
        self._credit = 0.0

    def observe(self, parts: FloatArray) -> None:
        """See `Policy`."""
        self.forecaster.observe(parts)
        last = place(parts.sum(0), self._spare)
        if self._last is not None and self.options.follow_share is not None:
            self._credit += self.options.follow_share * float(moved_slots(self._last, last).sum())
        self._last = last

    def decide(self) -> IntArray:
        """See `Policy`."""
        assert self._last is not None, "observe a window first"
        if self._slots is None:  # the first placement fills empty slots; nothing is moved
            self._slots = self._last
            return self._slots
        budget = np.inf if self.options.follow_share is None else self._credit
        if self.options.move_bytes is not None and self._slot_bytes:
            budget = min(budget, self.options.move_bytes // self._slot_bytes)
        after = migrate(self.forecaster.blend(), self._slots, self.options.move_price, budget)
        self._credit -= float(moved_slots(self._slots, after).sum())
        self._slots = after
        return after

    def placed(self, slots: IntArray) -> None:
        """Say what is in place, where a decision could not be carried out: int [L, E]."""
        self._slots = slots


POLICIES = ("raw", "static", "long", "short", "adaptive", "oracle")
"""In the order in which they are shown."""


def make_policy(
    name: str, spare: Spare, options: AdaptiveOptions | None = None, slot_bytes: int | None = None
) -> Policy | None:
    """The policy of that name; None for `oracle`, which only a replay can know.

    Raises:
        InputError: there is no such policy; the choices are listed.
    """
    makers: dict[str, Callable[[], Policy | None]] = {
        "raw": Raw,
        "static": lambda: Static(spare),
        "long": lambda: Filled(spare, 1.0),
        "short": lambda: Filled(spare, 0.0),
        "adaptive": lambda: Adaptive(spare, options, slot_bytes),
        "oracle": lambda: None,
    }
    if name not in makers:
        raise InputError(f"policy {name!r} is not one of {', '.join(POLICIES)}")
    return makers[name]()
