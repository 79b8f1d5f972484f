"""A balanced layer while its spare slots change hands.

How a slot moves, without memory beyond the plan's and without a forward ever reading a slot that is being written:

    1. a map in which the slot serves nobody replaces the layer's map (one reference; the expert's other slots serve)
    2. wait until every forward of the layer that began before has ended; it finishes on the map it began with
    3. write the slot, one weight at a time (working memory: one weight of one expert)
    4. a map in which the slot serves its new expert replaces the layer's map

If the write fails, the slot is written again with its old expert (the same weights, bit for bit) and the old map put
back. A call of the layer reads its map once, so it is consistent in itself.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np
import torch

from equipoise.errors import InputError
from equipoise.formats import get_format
from equipoise.models.families import MoELayer
from equipoise.runtime import slot_bytes
from equipoise.runtime.experts import Slots
from equipoise.types import IntArray


class Traffic:
    """Which forwards of a layer are under way."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: set[int] = set()
        self._next = 0
        self._mine = threading.local()

    def enter(self, *_: Any) -> None:
        """Pre-hook of the layer."""
        with self._changed:
            self._next += 1
            self._inside.add(self._next)
            self._mine.__dict__.setdefault("stack", []).append(self._next)

    def leave(self, *_: Any) -> None:
        """Hook of the layer, called on errors too."""
        stack = self._mine.__dict__.get("stack")
        if stack:  # a forward that began before the balancer was opened is not known here
            with self._changed:
                self._inside.discard(stack.pop())
                self._changed.notify_all()

    def drain(self, timeout: float) -> None:
        """Wait until every forward that is inside now has left."""
        with self._changed:
            before = set(self._inside)
            if not self._changed.wait_for(lambda: not (before & self._inside), timeout):
                raise TimeoutError(f"a forward of the layer has not ended for {timeout:g} s")


class LiveLayer:
    """The slots of one layer: which expert each holds, and how a spare one changes hands."""

    def __init__(self, layer: MoELayer) -> None:
        slots: Slots = layer.experts.equipoise_slots  # type: ignore[assignment]
        self.module = layer.experts
        self.original = slots
        self.traffic = Traffic()
        planned = slots.table.layer.slots
        self.experts = [slot.expert for slot in planned]
        self.primary: dict[int, int] = {}
        for s, expert in enumerate(self.experts):
            self.primary.setdefault(expert, s)
        self.spare = [s for s, expert in enumerate(self.experts) if self.primary[expert] != s]
        self.withdrawn: set[int] = set()
        for s in self.spare:
            source, target = planned[self.primary[planned[s].expert]].precision, planned[s].precision
            if source not in ("original", target):
                raise InputError(
                    f"layer {layer.layer_id}: expert {planned[s].expert} has a {target} replica of a {source} primary, "
                    "which cannot be made again from it; plan with one low precision"
                )
        self.sizes = {slot.precision: slot_bytes(slots.layout, slot.precision) for slot in planned}

    def counts(self) -> IntArray:
        """int64 [E] slots of each expert."""
        return np.bincount(self.experts, minlength=self.original.table.num_experts).astype(np.int64)

    def publish(self) -> None:
        """Make the map of this moment the layer's: one reference is replaced."""
        by_expert: list[list[int]] = [[self.primary[e]] for e in range(self.original.table.num_experts)]
        for s in self.spare:
            if s not in self.withdrawn:
                by_expert[self.experts[s]].append(s)
        slots = copy.copy(self.original)
        slots.table = self.original.table.rerouted(by_expert)
        self.module.equipoise_slots = slots  # type: ignore[assignment]

    def move(self, slot: int, expert: int, timeout: float) -> int:
        """Give a spare slot to another expert; return the bytes written. On an error the old map is back."""
        self.withdrawn.add(slot)
        self.publish()
        try:
            self.traffic.drain(timeout)
        except BaseException:
            self._serve(slot)  # not written yet
            raise
        try:
            self.write(slot, expert)
        except BaseException:
            # Should even the old expert's weights not be writable, the slot stays withdrawn: the map is right.
            self.write(slot, self.experts[slot])
            self._serve(slot)
            raise
        self.experts[slot] = expert
        self._serve(slot)
        return self.sizes[self.original.table.precision[slot]]

    def _serve(self, slot: int) -> None:
        self.withdrawn.discard(slot)
        self.publish()

    @torch.no_grad()
    def write(self, slot: int, expert: int) -> None:
        """Write an expert's weights into a slot that serves nobody, from the expert's primary."""
        table, primary = self.original.table, self.primary[expert]
        for weight in self.original.layout.weights:
            if not weight.quantizable or table.precision[slot] == table.precision[primary]:
                self.original.write(weight.name, slot, self.original.read(weight.name, primary))
            else:
                decoded = self.original.weight(weight.name, primary, weight.dtype)
                encoded = get_format(table.precision[slot]).encode(decoded, weight.out_axis)
                self.original.write(weight.name, slot, encoded)

    def changes(self, counts: IntArray) -> list[tuple[int, int]]:
        """(spare slot, its new expert) that lead to so many slots of each expert, fewest moves."""
        surplus = self.counts() - counts
        takers = np.repeat(np.arange(len(counts)), np.maximum(-surplus, 0)).tolist()
        # Slots that an earlier failure withdrew are written first: their own expert's weights, if it keeps them.
        moves = []
        for s in sorted(self.spare, key=lambda s: s not in self.withdrawn):
            if surplus[self.experts[s]] > 0 and takers:
                surplus[self.experts[s]] -= 1
                moves.append((s, int(takers.pop(0))))
            elif s in self.withdrawn:
                moves.append((s, self.experts[s]))
        return moves
