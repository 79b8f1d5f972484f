"""Forwards that begin at one of a model's blocks: what the blocks before it gave is kept, and given again.

A change in one layer changes nothing before it, so a model that is run once for every layer runs half of its blocks for
nothing. Blocks are the members of the model's module lists; a later one may read more than what the one before it
gave (keys shared between layers, a state kept in a module). So replay is tried at several depths first, with nothing
changed: where the predictions are not the same again, every forward is whole.

L blocks, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

_log = logging.getLogger("equipoise")

SAME = 1e-4
"""How far logits may be from those of a whole forward, relative to their largest: the order of sums, no more."""

Predict = Callable[[dict[str, Any]], torch.Tensor]


class Replay:
    """A model's predictions on some inputs, whole and from a block on.

    Args:
        model: in evaluation mode, not changed before the block from which it is replayed.
        inputs: what it is called with.
        predict: logits [T, V] of one of them.

    Attributes:
        before: predictions of each input, by the model as it is; held beside the outputs of all blocks, about
            T (L H + V) numbers.
        order: blocks in the order in which they are run; empty where every forward has to be whole.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, inputs: Sequence[dict[str, Any]], predict: Predict) -> None:
        self._inputs, self._predict = inputs, predict
        self._kept: list[dict[nn.Module, Any]] = []
        self.before: list[torch.Tensor] = []
        orders = []
        for batch in inputs:
            with _recorded(blocks_of(model)) as calls:
                self.before.append(predict(batch))
            orders.append([block for block, _ in calls])
            self._kept.append(dict(calls))
        self.order: list[nn.Module] = orders[0] if orders else []
        once = len(set(self.order)) == len(self.order) and all(order == self.order for order in orders)
        if inputs and not (once and self._is_same()):
            _log.info("%s: blocks read more than the one before gave; every forward is whole", type(model).__name__)
            self.order = []
            self._kept = [{} for _ in inputs]

    @torch.no_grad()
    def after(self, number: int, changed: nn.Module) -> torch.Tensor:
        """Predictions of an input by the model as it is now.

        Args:
            number: of the input.
            changed: what may be different from how it was, a module inside of a block.
        """
        inside = [any(module is changed for module in block.modules()) for block in self.order]
        return self._from(number, inside.index(True) if any(inside) else 0)

    def _from(self, number: int, depth: int) -> torch.Tensor:
        with ExitStack() as stack:
            for block in self.order[:depth]:
                stack.enter_context(forward_as(block, _given(self._kept[number][block])))
            return self._predict(self._inputs[number])

    def _is_same(self) -> bool:
        """Whether the first input is predicted as before from the last block, and from every quarter of them.

        Deep ones first, and after another input: what blocks keep between calls is then not that of the first, as long
        as they are not run.
        """
        if not self.order:
            return False
        if len(self._inputs) == 1:
            shifted = {k: v.roll(1, -1) if torch.is_tensor(v) else v for k, v in self._inputs[0].items()}
            self._predict(shifted)
        size, whole = len(self.order), self.before[0]
        for depth in sorted({size // 4, size // 2, 3 * size // 4, size - 1} - {0}, reverse=True):
            try:
                again = self._from(0, depth)
            except Exception:
                # Whatever a block misses, it is seen here and not later: nothing was changed yet.
                return False
            if again.shape != whole.shape or not bool((again - whole).abs().max() <= SAME * whole.abs().max()):
                return False
        return True


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The outermost members of the model's module lists: its blocks, one after the other."""
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.extend(child)
            else:
                walk(child)

    walk(model)
    return found


@contextmanager
def forward_as(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """A module computes by a function inside the block, hooks and all else as before."""
    own = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def _recorded(blocks: Sequence[nn.Module]) -> Iterator[list[tuple[nn.Module, Any]]]:
    """Every call of a block and what it gave, as copies: the next block may write into it."""
    calls: list[tuple[nn.Module, Any]] = []

    def hook(block: nn.Module, _: Any, output: Any) -> None:
        calls.append((block, _copied(output)))

    handles = [block.register_forward_hook(hook) for block in blocks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _given(output: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: _copied(output)


def _copied(output: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.clone, output)
