"""`watch`: counts what the router decides while a model runs, in `forward` and in `generate`.

A pre-hook on each experts module sees the decision after biases, groups and scaling, so it holds for every
family. Padding never counts, nor do selections that the family itself dropped (Switch's capacity). Counters stay
on the layer's device; nothing is copied to the host until it is asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from equipoise.models.families import MoELayer, Routing, find_layers, read_routing
from equipoise.profiling.padding import PaddingTracker
from equipoise.types import IntArray

Observer = Callable[[int, MoELayer, Routing, "torch.Tensor | None"], None]
"""Called for each layer of each forward with (row of the layer, layer, routing, real rows or None for all)."""


class Load:
    """What was counted so far. L layers, E experts, S_l slots of layer l."""

    def __init__(self, layers: list[MoELayer]) -> None:
        self.layers = layers
        self.top_k = 0
        self._lock = threading.Lock()
        self._experts: list[torch.Tensor | None] = [None] * len(layers)
        self._slots: list[torch.Tensor | None] = [None] * len(layers)

    @property
    def counts(self) -> IntArray:
        """int64 [L, E]. Selections of each expert."""
        return np.stack([_host(c, layer.num_experts) for c, layer in zip(self._experts, self.layers, strict=True)])

    @property
    def slot_counts(self) -> list[IntArray]:
        """int64 [S_l] a layer: selections that each slot executed. A layer without a plan has its experts' counts."""
        out = []
        for experts, slots, layer in zip(self._experts, self._slots, self.layers, strict=True):
            balanced: Any = getattr(layer.experts, "equipoise_slots", None)
            if balanced is None:
                out.append(_host(experts, layer.num_experts))
            else:
                out.append(_host(slots, balanced.table.num_slots))
        return out

    def reset(self) -> None:
        """Start again from zero."""
        with self._lock:
            self._experts = [None] * len(self.layers)
            self._slots = [None] * len(self.layers)

    def add(self, row: int, routing: Routing, real: torch.Tensor | None) -> None:
        """Count one forward of one layer."""
        layer = self.layers[row]
        index = routing.index.long()
        self.top_k = index.shape[1]
        balanced: Any = getattr(layer.experts, "equipoise_slots", None)
        if index.device.type == "cpu":
            with self._lock:
                self._add_on_host(row, index, real, None if balanced is None else balanced.table)
            return
        slots = None if balanced is None else balanced.table.assign(index)
        with self._lock:
            self._experts[row] = _count(self._experts[row], index, real, layer.num_experts)
            if slots is not None:
                self._slots[row] = _count(self._slots[row], slots, real, balanced.table.num_slots)

    def _add_on_host(self, row: int, index: torch.Tensor, real: torch.Tensor | None, table: Any) -> None:
        """As `add` on the CPU, where a dozen tensor operations on a few rows cost more than the counting."""
        size = self.layers[row].num_experts
        experts = self._experts[row]
        if experts is None:
            experts = self._experts[row] = _zeros(index, size)
        if table is None:
            kept = index if real is None else index[real]
            experts.numpy()[:] += np.bincount(kept.reshape(-1).numpy(), minlength=size + 1)
            return
        slots = self._slots[row]
        if slots is None:
            slots = self._slots[row] = _zeros(index, table.num_slots)
        table.count(index, real, experts.numpy(), slots.numpy())


def _zeros(index: torch.Tensor, size: int) -> torch.Tensor:
    """A counter of [size + 1] on the device of `index`. One made in inference mode could not be added to elsewhere."""
    with torch.inference_mode(False):
        return torch.zeros(size + 1, dtype=torch.int64, device=index.device)


def _count(counter: torch.Tensor | None, index: torch.Tensor, real: torch.Tensor | None, size: int) -> torch.Tensor:
    """Add the selections of real rows to a counter of [size + 1]; the last entry takes what does not count."""
    if counter is None:
        counter = _zeros(index, size)
    if real is not None:
        index = index.masked_fill(~real[:, None], size)
    flat = index.reshape(-1)
    return counter.scatter_add_(0, flat, torch.ones_like(flat))


def _host(counter: torch.Tensor | None, size: int) -> IntArray:
    return np.zeros(size, dtype=np.int64) if counter is None else counter[:size].cpu().numpy().astype(np.int64)


@contextmanager
def watch(model: PreTrainedModel, observer: Observer | None = None) -> Iterator[Load]:
    """Count the load of every forward of `model` inside the block, from any thread.

        with eq.watch(model) as load:
            model.generate(**batch)
        eq.lis(load.counts)

    Args:
        model: a model with MoE layers, balanced or not.
        observer: also called for each layer of each forward.

    Raises:
        InputError: the model has no layer that can be watched.
    """
    layers = find_layers(model)
    load = Load(layers)
    padding = PaddingTracker(model)

    def hook_of(row: int, layer: MoELayer) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            routing = read_routing(layer.layout, (*args, *kwargs.values()))
            real = padding.real_rows(len(routing.index))
            load.add(row, routing, real)
            if observer is not None:
                observer(row, layer, routing, real)

        return hook

    with ExitStack() as hooks, padding.tracking():
        for row, layer in enumerate(layers):
            handle = layer.experts.register_forward_pre_hook(hook_of(row, layer), with_kwargs=True)
            hooks.callback(handle.remove)
        yield load
