"""`StreamingBalancer`: replicas that follow the live load of a model while it serves.

    with eq.StreamingBalancer(model) as balancer:     # a model with a plan (eq.apply, or a balanced checkpoint)
        model.generate(**batch)                       # from any number of threads
    balancer.moves

Every `window` tokens the policy (`equipoise.streaming.policies`) decides anew how many slots each expert gets, and
spare slots move. The first slot of each expert, its primary, never moves and keeps the precision it was calibrated
to; a spare slot keeps its place, its precision and its bytes and gets another expert's weights, made from that
expert's primary.

How a slot moves without memory beyond the plan's is in `live_layer`. A step runs in the thread whose forward completed
the window, after the last MoE layer of that forward; the others go on, each call of a layer on the map it began with.
If a move fails the old map is put back, the failure is reported in `failures` and by a warning, and the next step
tries anew. On a device with streams, all forwards and the balancer must use the same one.
While a balancer is open the model cannot be saved (its weights are not those of its plan); `close` puts the plan's
replicas back.
"""

from __future__ import annotations

import threading
import time
import warnings
from contextlib import ExitStack
from typing import Any, Literal, get_args

import numpy as np
import torch
from transformers import PreTrainedModel

from equipoise.errors import InputError
from equipoise.models.families import MoELayer, Routing, find_layers
from equipoise.profiling import watch
from equipoise.runtime import plan_of
from equipoise.runtime.live_layer import LiveLayer
from equipoise.streaming.options import AdaptiveOptions
from equipoise.streaming.policies import Adaptive, Filled, Policy
from equipoise.types import IntArray

History = Literal["adaptive", "long", "short"]
PARTS = 8
"""Parts in which a window is observed: the last tokens say most about the next window."""


class StreamingBalancer:
    """Moves a balanced model's replicas to where its live load goes. A context manager; see the module.

    Args:
        model: with a plan that has spare slots.
        history: `adaptive`, or the paper's option 1 (`long`: all windows so far) or 2 (`short`: the last one).
        window: tokens a step.
        options: of the adaptive policy.
        drain_seconds: how long to wait for a forward to leave a slot before a move is given up.

    Attributes:
        steps: decisions so far.
        moves: slots moved.
        moved_bytes: bytes written for them.
        seconds: time spent deciding and moving.
        failures: what went wrong, one line each.

    Raises:
        InputError: the model has no plan or no spare slot, or an option is wrong.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        history: History = "adaptive",
        window: int = 512,
        options: AdaptiveOptions | None = None,
        drain_seconds: float = 60.0,
    ) -> None:
        if history not in get_args(History):
            raise InputError(f"history: {history!r} is not one of {', '.join(get_args(History))}")
        if options is not None and history != "adaptive":
            raise InputError(f"options are of the adaptive policy: leave them out with history {history!r}")
        if window < 1:
            raise InputError(f"window is a number of tokens and must be at least 1, got {window}")
        if plan_of(model) is None:
            raise InputError("the model has no plan: give it one with spare slots first (equipoise.apply)")
        self.model, self.window = model, window
        self.steps = self.moves = self.moved_bytes = 0
        self.seconds = 0.0
        self.failures: list[str] = []
        self._drain_seconds = drain_seconds
        found = find_layers(model)
        self._shape = (len(found), found[0].num_experts)
        self._live = {row: LiveLayer(layer) for row, layer in enumerate(found) if _balanced(layer)}
        spare = np.array([len(self._live[row].spare) if row in self._live else 0 for row in range(len(found))])
        if not spare.any():
            raise InputError("the model's plan has no spare slot to move: plan with replicas")
        self._policy: Policy
        if history == "adaptive":
            size = max(layer.sizes[layer.original.table.precision[s]] for layer in self._live.values()
                       for s in layer.spare)  # fmt: skip
            self._policy = Adaptive(spare, options, size, self.slots)
        else:
            self._policy = Filled(spare, 1.0 if history == "long" else 0.0)
        self._stepping = threading.Lock()
        self._counting = threading.Lock()
        self._hooks = ExitStack()
        self._open = False

    @property
    def slots(self) -> IntArray:
        """int64 [L, E] slots of each expert now."""
        return np.stack(
            [
                self._live[row].counts() if row in self._live else np.ones(self._shape[1], dtype=np.int64)
                for row in range(self._shape[0])
            ]
        )

    def __enter__(self) -> StreamingBalancer:
        """Begin to follow the model's forwards.

        Raises:
            InputError: another balancer follows this model.
        """
        if getattr(self.model, "equipoise_balancer", None) is not None:
            raise InputError("another StreamingBalancer follows this model: close it first")
        self.model.equipoise_balancer = self  # type: ignore[assignment]
        self._hooks.callback(setattr, self.model, "equipoise_balancer", None)
        quantizer: Any = self.model.hf_quantizer
        quantizer.is_serializable = lambda *_, **__: False
        self._hooks.callback(delattr, quantizer, "is_serializable")
        self._load = self._hooks.enter_context(watch(self.model, self._observer))
        self._tokens = self._window_tokens = 0
        self._parts: list[IntArray] = []
        self._seen = self._load.counts
        for live in self._live.values():
            for handle in (
                live.module.register_forward_pre_hook(live.traffic.enter, prepend=True),
                live.module.register_forward_hook(live.traffic.leave, always_call=True),
            ):
                self._hooks.callback(handle.remove)
        last = find_layers(self.model)[-1].experts
        self._hooks.callback(last.register_forward_hook(self._after).remove)
        self._open = True
        return self

    def __exit__(self, *_: object) -> None:
        """See `close`."""
        self.close()

    def close(self) -> None:
        """Stop following, and put the plan's own replicas and shares back."""
        if not self._open:
            return
        with self._stepping:
            self._open = False
            for live in self._live.values():
                planned = live.original.table.layer.slots
                for s in live.spare:
                    if live.experts[s] != planned[s].expert or s in live.withdrawn:
                        live.move(s, planned[s].expert, self._drain_seconds)
                live.module.equipoise_slots = live.original  # type: ignore[assignment]
            self._hooks.close()

    def observe(self, counts: Any) -> None:
        """Take a window that is over, and move what pays; for load that is counted elsewhere.

        Args:
            counts: [L, E] selections, or [P, L, E] in parts, in order.

        Raises:
            InputError: another shape, or not finite numbers from 0. Nothing has changed then.
        """
        parts = np.asarray(counts)
        if parts.ndim == 2:
            parts = parts[None]
        if parts.ndim != 3 or not len(parts) or parts.shape[1:] != self._shape:
            raise InputError(
                f"counts have shape {np.shape(counts)}; this model has {self._shape[0]} layers of {self._shape[1]} "
                "experts: give [layers, experts] or [parts, layers, experts]"
            )
        if parts.dtype.kind not in "iuf" or not np.isfinite(parts).all() or parts.min() < 0:
            raise InputError("counts hold selections: numbers from 0, neither NaN nor inf")
        with self._stepping:
            self._step(parts.astype(np.float64))

    def _observer(self, row: int, _layer: MoELayer, routing: Routing, real: torch.Tensor | None) -> None:
        if row == 0:
            with self._counting:
                self._tokens += len(routing.index) if real is None else int(real.sum())

    def _after(self, *_: Any) -> None:
        """After the last layer of a forward: close parts and windows that are full."""
        window = None
        with self._counting:
            if self._tokens * PARTS >= self.window:
                now = self._load.counts
                self._parts.append(now - self._seen)
                self._seen = now
                self._window_tokens += self._tokens
                self._tokens = 0
                if self._window_tokens >= self.window:
                    window, self._parts, self._window_tokens = np.stack(self._parts), [], 0
        # A step that another thread is at is not waited for: this window then goes unseen.
        if window is not None and self._stepping.acquire(blocking=False):
            try:
                if self._open:
                    self._step(window.astype(np.float64))
            finally:
                self._stepping.release()

    def _step(self, parts: np.ndarray) -> None:
        begin = time.perf_counter()
        try:
            if parts.any():
                self._policy.observe(parts)
                wanted = self._policy.decide()
                self.steps += 1
                for row, live in self._live.items():
                    for slot, expert in live.changes(wanted[row]):
                        self.moved_bytes += live.move(slot, expert, self._drain_seconds)
                        self.moves += 1
        except Exception as error:  # serving goes on with the map that is in place
            self.failures.append(f"step {self.steps}: {type(error).__name__}: {error}")
            warnings.warn(f"replicas stay as they are: {self.failures[-1]}", RuntimeWarning, stacklevel=2)
        finally:
            if isinstance(self._policy, Adaptive):
                self._policy.placed(self.slots)
            self.seconds += time.perf_counter() - begin


def _balanced(layer: MoELayer) -> bool:
    return hasattr(layer.experts, "equipoise_slots")
