"""What an expert is worth: the loss of held-out windows when the router may not select it.

Its router logit is set to minus infinity before the softmax, so its tokens go to their next choice and weights sum
to 1 again. The layers below do not change, so their output is computed once and only the rest is run for each expert.

B windows, W tokens of a window, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from equipoise.evaluation.data import Batch


@torch.inference_mode()
def removal_losses(model: Any, batches: Sequence[Batch], layer: int) -> dict[str, Any]:
    """Mean loss of every window (nats a token) with all experts of a layer, and with each of them removed.

    Args:
        model: a Mixtral.
        batches: full windows, no padding.
        layer: whose experts.

    Returns:
        `whole` [windows], `removed` [E][windows], `domains` [windows].
    """
    begun = [_reach(model, batch, layer) for batch in batches]
    gate = model.model.layers[layer].mlp.gate
    removed = []
    for expert in range(gate.num_experts):
        with without(gate, expert):
            removed.append(_finish(model, batches, begun, layer))
    return {
        "whole": _finish(model, batches, begun, layer),
        "removed": removed,
        "domains": [name for batch in batches for name in batch.domains],
    }


@contextmanager
def without(gate: Any, expert: int) -> Iterator[None]:
    """A Mixtral router that does not select one expert."""

    def reroute(_module: Any, _inputs: Any, output: Any) -> Any:
        logits = output[0].clone()
        logits[:, expert] = float("-inf")
        weights, chosen = logits.float().softmax(-1).topk(gate.top_k, -1)
        return logits, weights / weights.sum(-1, keepdim=True), chosen

    handle = gate.register_forward_hook(reroute)
    try:
        yield
    finally:
        handle.remove()


def _reach(model: Any, batch: Batch, layer: int) -> tuple[torch.Tensor, Any]:
    """Hidden states [B, W, H] that enter the layer, and the rotary tables."""
    x = model.model.embed_tokens(batch["input_ids"].to(model.device))
    positions = torch.arange(x.shape[1], device=x.device)[None]
    rotary = model.model.rotary_emb(x, positions)
    for block in model.model.layers[:layer]:
        x = block(x, position_embeddings=rotary, attention_mask=None)
    return x, rotary


def _finish(model: Any, batches: Sequence[Batch], begun: Sequence[tuple[torch.Tensor, Any]], layer: int) -> list[float]:
    losses: list[float] = []
    for batch, (x, rotary) in zip(batches, begun, strict=True):
        for block in model.model.layers[layer:]:
            x = block(x, position_embeddings=rotary, attention_mask=None)
        hidden = model.model.norm(x)
        for row, ids in zip(hidden, batch["input_ids"].to(hidden.device), strict=True):
            logits = model.lm_head(row[:-1]).float()
            losses.append(float(torch.nn.functional.cross_entropy(logits, ids[1:])))
    return losses
