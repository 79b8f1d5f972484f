"""The truth about an expert: what the model predicts otherwise when that expert, and nothing else, is changed.

    int8      the expert's weights rounded to the product's int8 and back (weight only)
    4 bits    rounded to 15 levels an output channel, which magnifies the effect so that it can be told from noise
    removed   the router may not choose it: its logit is minus infinity, and the token's next choice takes its place

With z the untouched model's logits of a token, p = softmax(z), d = z' - z the change of the logits and y the next token

    m = E_p[d]        u = d - m
    divergence = KL(p || p') = log1p(E_p[exp(u) - 1 - u])            never negative, exact also where it is tiny
    rise       = loss' - loss = divergence + m - d[y]

so the rise of the loss is the divergence plus a term that has mean 0 when the text is drawn from the model, and whose
standard deviation is about sqrt(2 divergence): a divergence of D nats is seen in the loss only after many times 2 / D
tokens. Both are means over the tokens of a window.

The layers below the changed one are run once. Everything is in float32: rounding to 16 bits is larger than the effects.

N windows, W tokens of a window, V words, E experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from equipoise.evaluation.data import Batch
from equipoise.formats import get_format
from equipoise.types import FloatArray

CHANGES = ("int8", "4 bits", "removed")
WEIGHTS = ("gate_up_proj", "down_proj")


def rounded(weight: torch.Tensor, change: str) -> torch.Tensor:
    """A matrix [out, in] as it is after rounding to `int8` or `4 bits`, in its own dtype."""
    if change == "int8":
        form = get_format("int8_weight_only")
        return form.decode(form.encode(weight.clone(), -2), -2, weight.dtype)
    scale = (weight.abs().amax(-1, keepdim=True) / 7).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scale).round_().clamp_(-7, 7).mul_(scale)


def chosen_without(logits: torch.Tensor, expert: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Routing weights and experts [tokens, k] of a Mixtral router that may not choose one expert."""
    logits = logits.clone()
    logits[:, expert] = float("-inf")
    weights, chosen = logits.float().softmax(-1).topk(top_k, -1)
    return weights / weights.sum(-1, keepdim=True), chosen


@contextlib.contextmanager
def changed(model: Any, experts: Mapping[int, int], change: str) -> Iterator[None]:
    """A Mixtral of which one expert in each named layer is changed.

    Args:
        model: in float32.
        experts: layer -> expert.
        change: of `CHANGES`.
    """
    with contextlib.ExitStack() as stack:
        for layer, expert in experts.items():
            block = model.model.layers[layer].mlp
            if change == "removed":

                def reroute(gate: Any, _inputs: Any, output: Any, expert: int = expert) -> Any:
                    return output[0], *chosen_without(output[0], expert, gate.top_k)

                stack.callback(block.gate.register_forward_hook(reroute).remove)
                continue
            for name in WEIGHTS:
                weight = getattr(block.experts, name).data[expert]
                kept = weight.clone()
                stack.callback(weight.copy_, kept)
                weight.copy_(rounded(weight, change))
        yield


def spread(batches: Sequence[Batch], count: int, width: int) -> tuple[torch.Tensor, tuple[str, ...]]:
    """The first `width` tokens of about `count` windows, taken from the domains in turn.

    Args:
        batches: full windows, no padding.
        count: windows; fewer where there are fewer.
        width: tokens; fewer where the windows are shorter.

    Returns:
        ids [N, width] and the domain of each.
    """
    left: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        for row, name in zip(batch["input_ids"], batch.domains, strict=True):
            left.setdefault(name, []).append(row[:width])
    taken: list[tuple[torch.Tensor, str]] = []
    while left and len(taken) < count:
        for name in list(left)[: count - len(taken)]:
            taken.append((left[name].pop(0), name))
            if not left[name]:
                del left[name]
    return torch.stack([row for row, _ in taken]), tuple(name for _, name in taken)


@dataclass(frozen=True)
class Effect:
    """What a change did.

    Attributes:
        divergence: float64 [N], mean over a window's tokens, nats.
        rise: float64 [N], of the loss, nats a token.
    """

    divergence: FloatArray
    rise: FloatArray


class Bench:
    """Windows whose forward was run up to a layer, and the untouched predictions.

    Args:
        model: a Mixtral in float32.
        ids: int64 [N, W].
        layer: changes are in this layer or above.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, ids: torch.Tensor, layer: int = 0) -> None:
        ids = ids.to(model.device)
        self.model, self.ids, self.layer = model, ids, layer
        x = model.model.embed_tokens(ids)
        self._rotary = model.model.rotary_emb(x, torch.arange(ids.shape[1], device=ids.device)[None])
        self._begun = self._blocks(x, 0, layer)
        self._logits = list(self._finish())
        self.losses = np.array(
            [float(torch.nn.functional.cross_entropy(z, row[1:])) for z, row in zip(self._logits, ids, strict=True)]
        )

    @torch.inference_mode()
    def effect(self) -> Effect:
        """Of the change that the model has now, see `changed`."""
        found = [
            _compare(z, after, row[1:]) for z, after, row in zip(self._logits, self._finish(), self.ids, strict=True)
        ]
        divergence, rise = np.array(found).T
        return Effect(divergence, rise)

    def _blocks(self, x: torch.Tensor, first: int, last: int | None) -> torch.Tensor:
        for block in self.model.model.layers[first:last]:
            x = block(x, position_embeddings=self._rotary, attention_mask=None)
        return x

    def _finish(self) -> Iterator[torch.Tensor]:
        """Logits [W - 1, V] of each window, one at a time."""
        hidden = self.model.model.norm(self._blocks(self._begun, self.layer, None))
        for row in hidden:
            yield self.model.lm_head(row[:-1])


def _compare(before: torch.Tensor, after: torch.Tensor, following: torch.Tensor) -> tuple[float, float]:
    """Mean divergence and mean rise of the loss over tokens: logits [W - 1, V] and the tokens that follow."""
    p = before.softmax(-1)
    d = after - before
    mean = (p * d).sum(-1, keepdim=True)
    u = d - mean
    divergence = ((torch.expm1(u) - u) * p).sum(-1).clamp_(min=0).log1p_()
    first = mean[:, 0] - d.gather(-1, following[:, None])[:, 0]
    return float(divergence.double().mean()), float((divergence + first).double().mean())


def singles(bench: Bench, change: str) -> Effect:
    """Every expert of the bench's layer, changed alone: `Effect` of arrays [E, N]."""
    experts = bench.model.model.layers[bench.layer].mlp.experts.num_experts
    effects = []
    for expert in range(experts):
        with changed(bench.model, {bench.layer: expert}, change):
            effects.append(bench.effect())
    return Effect(np.stack([e.divergence for e in effects]), np.stack([e.rise for e in effects]))
