"""`laser`: LASER routing for as long as a block lasts, on any supported family, with or without a plan.

Load is that of the batch in flight plus a window: what earlier batches chose, halved every `window` tokens. Where a
plan gave an expert r slots its load counts as that of its busiest slot, load / r with even shares.

T tokens, E experts, k experts a token selects, L layers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from equipoise.errors import InputError
from equipoise.models.families import MoELayer, find_layers
from equipoise.profiling.padding import PaddingTracker
from equipoise.rerouting.routers import Chosen, RouterPatch, classes_of, kind_of, router_of
from equipoise.rerouting.selection import Decision, Rule, Vector, on_host, select
from equipoise.rerouting.thresholds import Thresholds, load_laser
from equipoise.types import IntArray

WINDOW = 64
"""Tokens after which an earlier load counts half: it steers single decoding steps, a prompt is its own load."""


class Forwards:
    """What the layers of a forward are to remember, kept back until it has ended well; a stack a thread.

    A forward that fails half way must not leave its load in the layers that it had passed.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def when_done(self, remember: Callable[[], None]) -> None:
        """Call `remember` at the end of the forward in flight; at once when a layer is called on its own."""
        if getattr(self._local, "depth", 0):
            self._local.pending.append(remember)
        else:
            remember()

    @contextmanager
    def following(self, model: PreTrainedModel) -> Iterator[None]:
        """Follow the forwards of a model, and of the stacks inside it that are called on their own."""
        with ExitStack() as hooks:
            for module in model.modules():
                if isinstance(module, PreTrainedModel):
                    for handle in (
                        module.register_forward_pre_hook(self._enter),
                        module.register_forward_hook(self._done),
                        module.register_forward_hook(self._leave, always_call=True),
                    ):
                        hooks.callback(handle.remove)
            yield

    def _enter(self, *_: Any) -> None:
        self._local.depth = getattr(self._local, "depth", 0) + 1
        if self._local.depth == 1:
            self._local.pending = []

    def _done(self, *_: Any) -> None:
        if self._local.depth == 1:
            for remember in self._local.pending:
                remember()

    def _leave(self, *_: Any) -> None:
        self._local.depth -= 1


class LayerRouting:
    """The decisions of one layer, and the load it remembers. Safe to use from several threads."""

    def __init__(
        self, layer: MoELayer, rule: Rule, padding: PaddingTracker, forwards: Forwards, classes: int, window: int
    ) -> None:
        self.layer = layer
        self.rule = rule
        self.window = window
        self.moved: int | torch.Tensor = 0
        self.tokens = 0
        self._padding = padding
        self._forwards = forwards
        self._plan = _slots_of(layer)
        self._slots = slot_divisor(layer, classes)
        self._before = np.zeros_like(self._slots)
        self._lock = threading.Lock()

    def decide(self, scores: torch.Tensor, index: torch.Tensor, logits: bool) -> Chosen:
        """The experts of each token of a forward: scores [T, C], index int64 [T, k] -> int64 [T, k], and its scores.

        Raises:
            InputError: a score is NaN or infinite; no layer remembers anything of that forward.
        """
        rows = index.shape[0]
        if not rows:
            return index, None
        real = self._padding.real_rows(rows)
        if _slots_of(self.layer) is not self._plan:
            with self._lock:
                self._plan = _slots_of(self.layer)
                self._slots = slot_divisor(self.layer, len(self._slots))
        decision = self.choose(scores, index, self._before, real, logits)
        if decision is None:
            raise InputError(
                f"the router of layer {self.layer.layer_id} gave scores that are NaN or infinite; "
                "check the model's weights and the dtype it runs in"
            )
        self._forwards.when_done(partial(self._remember, decision))
        return decision.index, decision.scores

    def _remember(self, decision: Decision) -> None:
        with self._lock:
            if self.window:
                # A few dozen numbers, once a layer and step: on the host, in numpy.
                share = np.float32(0.5 ** (decision.tokens / self.window))
                self._before = (self._before + on_host(decision.loads)) * share
            self.moved = self.moved + decision.rerouted
            self.tokens += decision.tokens

    def choose(
        self, scores: torch.Tensor, index: torch.Tensor, before: Vector, real: torch.Tensor | None, logits: bool
    ) -> Decision | None:
        """As `select`, by the layer's rule."""
        experts = self.layer.num_experts
        return select(scores, index, self.rule, self._slots, before, real, logits=logits, experts=experts)


def slot_divisor(layer: MoELayer, classes: int) -> npt.NDArray[np.float32]:
    """What each expert's load is divided by to be that of its busiest slot: float32 [classes].

    1 without a plan, r with r even slots, 1 / (largest share) in general; inf for a class that is no expert.
    """
    divisor = np.ones(classes, np.float32)
    divisor[layer.num_experts :] = np.inf
    balanced = _slots_of(layer)
    if balanced is not None:
        divisor[: layer.num_experts] = 1 / balanced.table.largest_shares()
    return divisor


def _slots_of(layer: MoELayer) -> Any:
    """The slots that a plan gave the layer, None without one; a live balancer exchanges the object at each move."""
    return vars(layer.experts).get("equipoise_slots")


class Laser:
    """What LASER did inside the block so far.

    Attributes:
        thresholds: the rules in use.
        layers: decisions, one a layer that LASER decides; layers that route by a table of token ids have none.
        fixed: the model's own numbers of those layers.
        names: module paths of the experts of all MoE layers.
    """

    def __init__(
        self, thresholds: Thresholds, layers: Sequence[LayerRouting], fixed: Sequence[int], names: Sequence[str]
    ) -> None:
        self.thresholds = thresholds
        self.names = tuple(names)
        self.layers = tuple(layers)
        self.fixed = tuple(fixed)

    @property
    def rerouted(self) -> IntArray:
        """int64 [layers]: tokens that did not get their top-k."""
        return np.array([int(layer.moved) for layer in self.layers], dtype=np.int64)

    @property
    def tokens(self) -> IntArray:
        """int64 [layers]: tokens that LASER looked at, padding left out."""
        return np.array([layer.tokens for layer in self.layers], dtype=np.int64)


@contextmanager
def installed(
    model: PreTrainedModel, thresholds: Thresholds, window: int = WINDOW, routing: type[LayerRouting] = LayerRouting
) -> Iterator[Laser]:
    """LASER with known thresholds, inside the block.

    Args:
        model: balanced or not.
        thresholds: one rule a MoE layer.
        window: tokens after which an earlier batch's load counts half; 0: only the batch in flight counts.
        routing: what decides in each layer.

    Raises:
        InputError: a router cannot be adapted, or the thresholds are another model's. The model is then untouched.
    """
    if window < 0:
        raise InputError(f"laser: window must not be negative, got {window}")
    found = find_layers(model)
    thresholds.check(model, found)
    padding, forwards = PaddingTracker(model), Forwards()
    work, fixed = [], []
    for layer, rule in zip(found, thresholds.rules, strict=True):
        router = router_of(model.get_submodule(layer.name.rpartition(".")[0]))
        if router is None:
            raise InputError(
                f"laser found no router beside the experts {layer.name} of model_type {model.config.model_type!r}; "
                "balance this family with a plan instead"
            )
        if getattr(router, "equipoise_laser", False):
            raise InputError("laser is installed on this model already; leave that block first")
        if kind_of(router) is None:
            fixed.append(layer.layer_id)
            continue
        classes = classes_of(router, layer.num_experts)
        work.append((router, routing(layer, rule, padding, forwards, classes, window)))
    with ExitStack() as undo, padding.tracking(), forwards.following(model):
        for router, layer_routing in work:
            patch = RouterPatch(router, layer_routing.layer, layer_routing.decide)
            undo.callback(patch.remove)
        yield Laser(thresholds, [layer_routing for _, layer_routing in work], fixed, [layer.name for layer in found])


@contextmanager
def laser(
    model: PreTrainedModel,
    thresholds: Thresholds | None = None,
    *,
    calibration: Iterable[Mapping[str, torch.Tensor]] | None = None,
    max_loss_increase: float | None = None,
    keep_strongest: bool = True,
    window: int = WINDOW,
) -> Iterator[Laser]:
    """Route by score distribution and load inside the block (arXiv 2510.03293).

        with eq.laser(model, calibration=batches) as routing:
            model.generate(**batch)
        routing.rerouted

    Args:
        model: with MoE layers, balanced or not.
        thresholds: from `calibrate` or `load_laser`. None: calibrated here, or those stored beside the checkpoint.
        calibration: batches to calibrate on (dicts with input_ids, attention_mask).
        max_loss_increase: relative, of the loss on the calibration text; 0.005 when not given.
        keep_strongest: every token keeps its strongest expert. That sets a floor to what balance can be had (the
            busiest expert by first choices alone); False lets the calibration give it up where that pays.
        window: tokens after which an earlier batch's load counts half; 0: only the batch in flight counts.

    Raises:
        InputError: no thresholds and nothing to calibrate on; a router that cannot be adapted; another model's
            thresholds.
    """
    from equipoise.rerouting.calibration import MAX_LOSS_INCREASE, calibrate

    if thresholds is not None and calibration is not None:
        raise InputError("laser: give thresholds or calibration text, not both")
    if calibration is None and (max_loss_increase is not None or not keep_strongest):
        raise InputError(
            "laser: max_loss_increase and keep_strongest are for calibration: give calibration batches too"
        )
    if calibration is not None:
        bound = MAX_LOSS_INCREASE if max_loss_increase is None else max_loss_increase
        thresholds = calibrate(
            model, list(calibration), max_loss_increase=bound, keep_strongest=keep_strongest, window=window
        ).thresholds
    elif thresholds is None:
        thresholds = load_laser(model)
    with installed(model, thresholds, window) as routing:
        yield routing
