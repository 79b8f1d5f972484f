"""A 16-bit model that computes in float32, its weights widened a block at a time.

In bfloat16 any change at all, however small, sets every later rounding anew: on a model of 30 layers that alone is a
divergence of 1e-3 nats, several times what lowering a whole layer to int8 costs. In float32 the change is all that is
seen. (On a CPU without bfloat16 products it is also the faster of the two.)

Memory: one block in float32, and what is outside of the blocks (embeddings, head).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from equipoise.profiling.replay import blocks_of, forward_as
from equipoise.profiling.sensitivity import one_by_one


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Every forward of the model inside the block is computed in float32. Not for several threads at once.

    On a GPU experts run one by one (transformers' `eager`): grouped products in float32 are not in every torch there.
    """
    blocks = blocks_of(model)
    within = {id(tensor) for block in blocks for tensor in _tensors(block)}
    with ExitStack() as stack:
        if model.device.type != "cpu":
            stack.enter_context(one_by_one(model))
        stack.enter_context(_widened([tensor for tensor in _tensors(model) if id(tensor) not in within]))
        for block in blocks:
            # Not by hooks: a block whose forward is replaced (`replay`) needs no weights.
            stack.enter_context(forward_as(block, _wide(block, block.forward)))
        yield


def _wide(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wide(*args: Any, **kwargs: Any) -> Any:
        with _widened(_tensors(block)):
            return forward(*args, **kwargs)

    return wide


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers in 16 bits, each once."""
    found = {id(t): t for t in [*module.parameters(), *module.buffers()] if t.dtype in (torch.bfloat16, torch.float16)}
    return list(found.values())


@contextmanager
def _widened(tensors: list[torch.Tensor]) -> Iterator[None]:
    kept = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, before in zip(tensors, kept, strict=True):
            tensor.data = before
