"""A 16-bit model that computes in float32, its weights widened a block at a time.

In bfloat16 any change at all, however small, sets every later rounding anew: on a model of 30 layers that alone is a
divergence of 1e-3 nats, several times what lowering a whole layer to int8 costs. In float32 the change is all that is
seen. (On a CPU without bfloat16 products it is also the faster of the two.)

Memory: one block in float32, and what is outside of the blocks (embeddings, head).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from equipoise.profiling.sensitivity import differentiable


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Every forward of the model inside the block is computed in float32. Not for several threads at once.

    Experts run one by one (transformers' `eager`): grouped products in float32 are not in every torch for GPUs.
    """
    blocks = _blocks(model)
    within = {id(tensor) for block in blocks for tensor in _tensors(block)}
    with differentiable(model), ExitStack() as stack:
        stack.enter_context(_widened([tensor for tensor in _tensors(model) if id(tensor) not in within]))
        for block in blocks:
            held = ExitStack()
            stack.callback(held.close)

            def enter(module: Any, _: Any, held: ExitStack = held) -> None:
                held.enter_context(_widened(_tensors(module)))

            def leave(_: Any, __: Any, output: Any, held: ExitStack = held) -> None:
                held.close()

            stack.callback(block.register_forward_pre_hook(enter).remove)
            stack.callback(block.register_forward_hook(leave, always_call=True).remove)
        yield


def _blocks(model: nn.Module) -> list[nn.Module]:
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
