"""Windows of a serving model's load: what was routed, and what each slot executed, every W tokens.

The forward that completes a window closes it, after the last MoE layer; forwards of other threads that are under way
are then in the window with the layers they have passed. Within a window parts are kept, because its last tokens say
most about the next. Counts come from `watch`, so padding never counts; between two ends of a part a forward costs
what `watch` costs and one comparison. Tokens are those that passed the last MoE layer: a forward that failed before
has none, and of an encoder-decoder they are the decoder's.

W tokens a window, P parts, L layers, E experts, S_l slots of layer l.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from equipoise.errors import InputError
from equipoise.models.families import MoELayer, Routing, find_layers
from equipoise.profiling.watching import watch
from equipoise.streaming.trace import PARTS
from equipoise.types import IntArray


@dataclass(frozen=True)
class LiveWindow:
    """A window that is over.

    Attributes:
        tokens: in it, at least W.
        parts: int64 [P', L, E] selections in each of its parts, in order; a long forward makes a long part.
        slots: int64 [S_l] a layer, selections that each slot executed.
    """

    tokens: int
    parts: IntArray
    slots: tuple[IntArray, ...]

    @property
    def counts(self) -> IntArray:
        """int64 [L, E] selections of each expert."""
        return np.asarray(self.parts.sum(0))


class LiveWindows:
    """Follows the forwards of a model for as long as a block lasts. Safe with forwards from several threads.

    Args:
        model: with MoE layers, balanced or not.
        window: W.
        closed: called with each window, in the thread and inside the forward that closed it.

    Attributes:
        labels: name of each MoE layer by its module path: the model's own number of it, or, where two layers have the
            same number, that path.
        tokens: seen so far, padding left out.
        count: windows so far.
        latest: the last of them.

    Raises:
        InputError: window below 1, or a model without MoE layers.
    """

    def __init__(
        self, model: PreTrainedModel, window: int = 512, closed: Callable[[LiveWindow], None] | None = None
    ) -> None:
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise InputError(f"window is a number of tokens and must be at least 1, got {window!r}")
        layers = find_layers(model)
        numbers = [str(layer.layer_id) for layer in layers]
        names = [layer.name for layer in layers]
        self.labels = dict(zip(names, numbers if len(set(numbers)) == len(layers) else names, strict=True))
        self.num_experts = layers[0].num_experts
        self.window = window
        self.tokens = self.count = 0
        self.latest: LiveWindow | None = None
        self._model, self._closed, self._last = model, closed, layers[-1].experts
        self._last_row = len(layers) - 1
        self._lock = threading.Lock()
        self._mine = threading.local()
        self._hooks = ExitStack()

    def __enter__(self) -> LiveWindows:
        """Begin to follow the model's forwards."""
        self._load = self._hooks.enter_context(watch(self._model, self._observe))
        self._part_tokens = self._window_tokens = 0
        self._parts: list[IntArray] = []
        self._counts, self._slots = self._load.counts, self._load.slot_counts
        self._hooks.callback(self._last.register_forward_hook(self._after).remove)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop following; what was counted stays."""
        self._hooks.close()

    def _observe(self, row: int, _layer: MoELayer, routing: Routing, real: torch.Tensor | None) -> None:
        if row == self._last_row:
            self._mine.tokens = len(routing.index) if real is None else int(real.sum())

    def _after(self, *_: Any) -> None:
        """After the last layer of a forward: close parts and windows that are full."""
        window = None
        tokens = self._mine.__dict__.pop("tokens", 0)
        with self._lock:
            self.tokens += tokens
            self._part_tokens += tokens
            if self._part_tokens and self._part_tokens * PARTS >= self.window:
                now = self._load.counts
                self._parts.append(now - self._counts)
                self._counts = now
                self._window_tokens += self._part_tokens
                self._part_tokens = 0
                if self._window_tokens >= self.window:
                    window = self._close()
        if window is not None and self._closed is not None:
            self._closed(window)

    def _close(self) -> LiveWindow:
        slots = self._load.slot_counts
        executed = tuple(now - before for now, before in zip(slots, self._slots, strict=True))
        self.latest = LiveWindow(self._window_tokens, np.stack(self._parts), executed)
        self._parts, self._window_tokens, self._slots = [], 0, slots
        self.count += 1
        return self.latest
