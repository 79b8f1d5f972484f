"""Reaching the selection inside a family's router: one adapter a kind of router.

Every router ends in the same way: scores, biases and groups, *a selection*, and only then the weights of what was
selected, from its own scores, normalised and scaled as the family does. So LASER exchanges the selection where it
happens: for the duration of the router's forward, in this thread, `torch.topk` (or the `argmax` of a top-1 router)
on the scores of all experts goes through `Decide`, and the family's own code computes the weights of the outcome.
Nothing of a family's formulas is repeated here, and an outcome that equals the family's is bit-equal. To watch every
call of torch takes a tenth of a millisecond a layer in a decoding step, so it is done in the first forward; in later
ones, where the family's own code calls `torch.topk` by that name, only this name is ours (`rebound`).

    kind         selects by                                            families
    top-k        one topk over [T, E], after softmax, sigmoid, groups  nearly all
    top-1        argmax, then max for the weight                       Switch Transformers
    sparsemixer  max, and max of the rest                              PhiMoE
    table        the token's id, not a score: nothing to exchange      hash layers of DeepSeek-V4

A router of no such kind is refused when LASER is installed, one that turns out to select otherwise at its first
forward.

T tokens, E classes of the router, k experts a token selects.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from equipoise.errors import InputError
from equipoise.models.families import MoELayer
from equipoise.rerouting.rebound import rebound

Chosen = tuple[torch.Tensor, torch.Tensor | None]
"""int64 [T, k], and its scores [T, k] where they are at hand."""
Decide = Callable[[torch.Tensor, torch.Tensor, bool], Chosen]
"""(scores [T, E], the family's choice int64 [T, k], whether the scores are logits) -> what is chosen."""

_TOPK = {torch.topk, torch.Tensor.topk}
_ARGMAX = {torch.argmax, torch.Tensor.argmax}
_MAX = {torch.max, torch.Tensor.max}
# What makes scores of logits. A router that selects before any of them selects by logits.
_SQUASH = {
    torch.softmax,
    torch.Tensor.softmax,
    functional.softmax,
    torch.sigmoid,
    torch.Tensor.sigmoid,
    functional.sigmoid,
    functional.softplus,
}
_SEEN = _TOPK | _ARGMAX | _MAX | _SQUASH
"""Everything else passes at once: a router makes half a dozen calls, and a decoding step waits for each."""


def router_of(block: nn.Module) -> nn.Module | None:
    """The router beside the experts in their block; None when there is none of a known name."""
    found = [child for name, child in block.named_children() if name in ("gate", "router")]
    return found[0] if len(found) == 1 else None


def classes_of(router: nn.Module, num_experts: int) -> int:
    """What the router chooses from: E, or one more where a class stands for no expert (ZAYA)."""
    return int(getattr(router, "num_router_classes", num_experts))


def kind_of(router: nn.Module) -> type[Selecting] | None:
    """The adapter of a router by what it has and calls; None for one that selects by a table.

    Raises:
        InputError: it is of no known kind.
    """
    if hasattr(router, "tid2eid"):
        return None
    calls = _calls(type(router))
    for kind in (SelectingSparsemixer, SelectingTopK, SelectingTop1):
        if kind.call in calls:
            return kind
    raise InputError(
        f"laser cannot adapt the router {type(router).__name__}: it selects neither by topk nor by argmax; "
        "balance this family with a plan instead (`equipoise balance`)"
    )


def _calls(cls: type) -> set[str]:
    """Names that the methods of a class use."""
    own = [c for c in cls.__mro__ if c not in nn.Linear.__mro__]
    methods = [entry for c in own for entry in vars(c).values() if hasattr(entry, "__code__")]
    return {name for method in methods for name in method.__code__.co_names}


class Selecting:
    """Exchanges the selection of one forward of a router.

    Attributes:
        logits: whether the scores are logits, as far as what was called so far says; what is called after the
            selection says nothing of it.
        selections: how many selections were seen.
    """

    call = ""

    def __init__(self, classes: int, decide: Decide) -> None:
        self.classes = classes
        self.decide = decide
        self.logits = True
        self.selections = 0

    def see(self, func: Any, scores: torch.Tensor, out: Any) -> Any:
        """What `func(scores, ...)` is to return instead of `out`."""
        raise NotImplementedError

    def exchanged(self, scores: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Decide on flattened rows. scores [..., E], index int64 [..., k] -> another index and its scores, or None."""
        self.selections += 1
        own = index if index.ndim == 2 else index.reshape(-1, index.shape[-1])
        chosen, value = self.decide(scores if own is index else scores.reshape(-1, self.classes), own, self.logits)
        if chosen is own:
            return None
        if own is not index:
            chosen, value = chosen.reshape(index.shape), None if value is None else value.reshape(index.shape)
        return chosen, scores.gather(-1, chosen) if value is None else value


class SelectingTopK(Selecting):
    """One topk over the scores of all experts. Group scores are fewer, or have an axis more."""

    call = "topk"
    grouped = True

    def see(self, func: Any, scores: torch.Tensor, out: Any) -> Any:
        """Values and places of the exchanged selection."""
        # A third axis is that of the groups.
        axes = 2 if self.grouped else 3
        if func not in _TOPK or scores.shape[-1] != self.classes or scores.ndim > axes:
            return out
        found = self.exchanged(scores, out.indices)
        return out if found is None else torch.return_types.topk(found[::-1])


class SelectingTopKFlat(SelectingTopK):
    """A router without groups whose scores keep the batch's two axes."""

    grouped = False


class SelectingTop1(Selecting):
    """Argmax, then max over the same scores for the weight."""

    call = "argmax"
    _chosen: torch.Tensor | None = None

    def see(self, func: Any, scores: torch.Tensor, out: Any) -> Any:
        """The exchanged argmax; later the score of what was chosen in place of the largest."""
        if scores.shape[-1] != self.classes:
            return out
        if func in _ARGMAX:
            found = self.exchanged(scores, out[..., None])
            self._chosen = out[..., None] if found is None else found[0]
            return self._chosen[..., 0]
        if func in _MAX and self._chosen is not None:
            value = scores.gather(-1, self._chosen)[..., 0]
            return torch.return_types.max((value, self._chosen[..., 0]))
        return out


class SelectingSparsemixer(Selecting):
    """The largest score, then the largest of the rest: the second is exchanged."""

    call = "sparsemixer"
    _first: tuple[torch.Tensor, torch.Tensor] | None = None

    def see(self, func: Any, scores: torch.Tensor, out: Any) -> Any:
        """The second max, exchanged."""
        if func not in _MAX or scores.shape[-1] != self.classes:
            return out
        if self._first is None:
            self._first = (scores, out.indices)
            return out
        whole, strongest = self._first
        self.logits = True  # sparsemixer's own softmax comes between the two, but both select by logits
        found = self.exchanged(whole, torch.cat([strongest, out.indices], -1))
        if found is None:
            return out
        index = found[0][..., 1:]
        return torch.return_types.max((scores.gather(-1, index), index))


class Watching(TorchFunctionMode):
    """Shows a `Selecting` what a block calls of torch."""

    def __init__(self, selecting: Selecting) -> None:
        super().__init__()
        self.selecting = selecting

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `func`; a selection is exchanged."""
        out = func(*args, **kwargs) if kwargs else func(*args)
        if func not in _SEEN:
            return out
        if func in _SQUASH:
            self.selecting.logits &= self.selecting.selections > 0
            return out
        return self.selecting.see(func, args[0], out) if args and isinstance(args[0], torch.Tensor) else out


class RouterPatch:
    """Puts the selection of one layer's router through `decide`, until removed.

    The first forward watches all that the router calls, and says whether it selects by logits.
    """

    def __init__(self, router: nn.Module, layer: MoELayer, decide: Decide) -> None:
        kind = kind_of(router)
        if kind is None:
            raise InputError(
                f"layer {layer.layer_id} routes by a table of token ids, laser has nothing to decide there"
            )
        classes = classes_of(router, layer.num_experts)
        if classes != layer.num_experts and kind is SelectingTopK:
            kind = SelectingTopKFlat
        self.router = router
        self._own = vars(router).get("forward")
        self._inner = router.forward
        self._selecting = partial(kind, classes, decide)
        self._logits: bool | None = None  # known once a forward was watched
        self._here = threading.local()
        self._direct = rebound(self._inner, "topk", self._topk) if issubclass(kind, SelectingTopK) else None
        router.forward = self._forward  # type: ignore[method-assign]
        router.equipoise_laser = True  # type: ignore[assignment]
        self._refusal = (
            f"laser cannot adapt the router {type(router).__name__} of layer {layer.layer_id}: it made "
            f"{{}} selections among {classes} experts where one was expected; "
            "balance this family with a plan instead"
        )

    @property
    def direct(self) -> bool:
        """Whether the next forward sees the selection alone."""
        return self._direct is not None and self._logits is not None

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        selecting = self._selecting()
        direct, logits = self._direct, self._logits
        if direct is not None and logits is not None:
            selecting.logits = logits
            self._here.selecting = selecting
            out = direct(*args, **kwargs)
            if not selecting.selections:  # the call is made elsewhere in the family's code
                self._direct = None
                return self._forward(*args, **kwargs)
        else:
            with Watching(selecting):
                out = self._inner(*args, **kwargs)
        if selecting.selections != 1:
            raise InputError(self._refusal.format(selecting.selections))
        self._logits = selecting.logits
        return out

    def _topk(self, scores: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """`torch.topk` as the router's own code sees it, in this thread's forward."""
        return self._here.selecting.see(torch.topk, scores, torch.topk(scores, *args, **kwargs))

    def remove(self) -> None:
        """Give the router its own forward back."""
        del self.router.equipoise_laser
        if self._own is None:
            del self.router.forward
        else:
            self.router.forward = self._own
