"""`StreamingBalancer`: replicas that follow the live load of a model while it serves.

    with eq.StreamingBalancer(model) as balancer:     # a model with a plan (eq.apply, or a balanced checkpoint)
        model.generate(**batch)                       # from any number of threads
    balancer.telemetry()

Every `window` tokens the policy (`equipoise.streaming.policies`) decides anew how many slots each expert gets, and
spare slots move. The first slot of each expert, its primary, never moves and keeps the precision it was calibrated
to; a spare slot keeps its place, its precision and its bytes and gets another expert's weights, made from that
expert's primary.

Spare slots are memory, and memory comes out of a plan: at the original bytes there is room for them only where some
experts hold less than their original precision, and which of them can is what a profile says. So a model without a
plan is balanced with `replicas=R, profile=P`: a joint plan of exactly R spare slots a layer within `budget` is made
and applied in place. It is refused, with the figures, where the budget has no room for them.

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
from transformers import PreTrainedModel

from equipoise.errors import InputError
from equipoise.models.families import MoELayer, find_layers
from equipoise.profiling.live_windows import LiveWindow, LiveWindows
from equipoise.runtime.application import apply
from equipoise.runtime.install import plan_of
from equipoise.runtime.live_layer import LiveLayer
from equipoise.streaming.options import AdaptiveOptions
from equipoise.streaming.policies import Adaptive, Filled, Policy
from equipoise.types import IntArray, Profile

History = Literal["adaptive", "long", "short"]


class StreamingBalancer:
    """Moves a balanced model's replicas to where its live load goes. A context manager; see the module.

    Args:
        model: with a plan that has spare slots; or without a plan, to be given one in place (`replicas`, `profile`).
        history: `adaptive`, or the paper's option 1 (`long`: all windows so far) or 2 (`short`: the last one).
        window: tokens a step.
        options: of the adaptive policy.
        drain_seconds: how long to wait for a forward to leave a slot before a move is given up.
        replicas: R, spare slots of each layer: of the plan that is made, or that the model's own plan must have.
        profile: of this model without a plan, from `equipoise.profile`; what the plan of R replicas is made from.
        budget: bytes of that plan, as a multiple of the original expert bytes; 1.0 when not given.

    Attributes:
        steps: decisions so far.
        moved: int64 [L] slots moved in each layer.
        moved_bytes: bytes written for them.
        seconds: time spent deciding and moving.
        missed: windows that were over while a step was under way, and decided nothing.
        failures: what went wrong, one line each (the last 100).
        windows: the live load, `equipoise.profiling.live_windows`.

    Raises:
        InputError: the model has no plan or no spare slot, there is no room for replicas, or an option is wrong. The
            model is then as it was.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        history: History = "adaptive",
        window: int = 512,
        options: AdaptiveOptions | None = None,
        drain_seconds: float = 60.0,
        *,
        replicas: int | None = None,
        profile: Profile | None = None,
        budget: float | None = None,
    ) -> None:
        if history not in get_args(History):
            raise InputError(f"history: {history!r} is not one of {', '.join(get_args(History))}")
        if options is not None and history != "adaptive":
            raise InputError(f"options are of the adaptive policy: leave them out with history {history!r}")
        self.windows = LiveWindows(model, window, self._window_over)
        _make_room(model, replicas, profile, budget)
        self.model, self.window = model, window
        self.steps = self.moved_bytes = self.missed = 0
        self.seconds = 0.0
        self.failures: list[str] = []
        self.failed = 0
        self._drain_seconds = drain_seconds
        found = find_layers(model)
        self._shape = (len(found), found[0].num_experts)
        self.moved: IntArray = np.zeros(len(found), dtype=np.int64)
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
        self._hooks = ExitStack()
        self._open = False

    @property
    def moves(self) -> int:
        """Slots moved so far, all layers."""
        return int(self.moved.sum())

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
        for live in self._live.values():
            for handle in (
                live.module.register_forward_pre_hook(live.traffic.enter, prepend=True),
                live.module.register_forward_hook(live.traffic.leave, always_call=True),
            ):
                self._hooks.callback(handle.remove)
        # After the layers' own hooks: the forward that steps has left its last layer by then, and does not wait for
        # itself.
        self._hooks.enter_context(self.windows)
        if isinstance(self._policy, Adaptive):
            self._policy.placed(self.slots)  # opened again: the plan's own, whatever was in place before
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

    def telemetry(self) -> dict[str, Any]:
        """What it has done and how the load lies, as a plain dict: see `equipoise.telemetry`."""
        from equipoise.telemetry.readings import read

        return read(self.windows, self)

    def _window_over(self, window: LiveWindow) -> None:
        # A step that another thread is at is not waited for: this window then goes unseen.
        if not self._stepping.acquire(blocking=False):
            self.missed += 1
            return
        try:
            if self._open:
                self._step(window.parts.astype(np.float64))
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
                        self.moved[row] += 1
        except Exception as error:  # serving goes on with the map that is in place
            self.failed += 1
            self.failures = [*self.failures[-99:], f"step {self.steps}: {type(error).__name__}: {error}"]
            warnings.warn(f"replicas stay as they are: {self.failures[-1]}", RuntimeWarning, stacklevel=2)
        finally:
            if isinstance(self._policy, Adaptive):
                self._policy.placed(self.slots)
            self.seconds += time.perf_counter() - begin


def _make_room(model: PreTrainedModel, replicas: int | None, profile: Profile | None, budget: float | None) -> None:
    """See to it that the model has a plan with spare slots: its own, or one of so many replicas, applied here."""
    own = plan_of(model)
    if replicas is not None and (isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 1):
        raise InputError(f"replicas is a number of spare slots a layer and must be at least 1, got {replicas!r}")
    if own is not None:
        if profile is not None or budget is not None:
            raise InputError("the model has a plan already, in which its room is spoken for: leave profile and budget "
                             "out, or load the original model")  # fmt: skip
        spare = sorted({len(layer.slots) - layer.num_experts for layer in own.layers})
        if replicas is not None and spare != [replicas]:
            raise InputError(
                f"the model's plan has {' to '.join(map(str, dict.fromkeys((spare[0], spare[-1]))))} spare slots a "
                f"layer, not {replicas}: leave replicas out to use them, or load the original model"
            )
        return
    if replicas is None:
        raise InputError(
            "the model has no plan, so no room for replicas: give it one (equipoise.apply), or give replicas and the "
            "model's profile here"
        )
    if profile is None:
        raise InputError(
            f"room for {replicas} replicas a layer comes from experts that can bear lower precision, which a profile "
            "tells: give profile=equipoise.profile(model, batches)"
        )
    from equipoise.planning import plan

    apply(model, plan(profile, replicas=replicas, budget=1.0 if budget is None else budget))


def _balanced(layer: MoELayer) -> bool:
    return hasattr(layer.experts, "equipoise_slots")
