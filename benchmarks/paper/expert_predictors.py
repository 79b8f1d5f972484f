"""What might predict the truth of `expert_changes`, from calibration tokens and without changing the model.

For an expert e of a layer, with delta_t the change of the layer's output at token t that the change of e causes, all
other things equal; g_t the gradient of the summed log-probability of the window's next tokens by that output, the
next tokens drawn from the model itself; h_t the same with the text's own next tokens; T tokens, H width, and R the
squared norm of the layer's routed output over all tokens:

    own error         sum_t |delta_t|^2 / R                         `error` of the profile, with this very change
    error x layer     1/2T sum_t |delta_t|^2 * mean_t |g_t|^2 / H   any direction, at the layer's sensitivity
    error x token     1/2T sum_t |delta_t|^2 * |g_t|^2 / H          the same, at each token's sensitivity
    fisher            1/2T sum_t (g_t . delta_t)^2                  the second-order term of the divergence (E[g g'] is
                                                                    its Hessian), tokens taken as independent
    slope             -1/T sum_t h_t . delta_t                      the first-order term of the rise of the loss, signed
    size              sum_t w_t^2 |f_e(x_t)|^2 / R                  gate-weighted norm of what the expert says

The sums over t run over tokens that chose e. For a removed expert delta is what the next choice and the new weights
make of the output; for a rounded one it is w_t (f_e'(x_t) - f_e(x_t)).

Cost: one forward, two backward passes, and all experts of the layers once on all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from expert_changes import CHANGES, chosen_without, rounded

NAMES = ("own error", "error x layer", "error x token", "fisher", "slope", "size")


@dataclass(frozen=True)
class Seen:
    """A layer's experts on calibration tokens, all float32.

    Attributes:
        x: [T, H], their input.
        logits: [T, E], of the router.
        weights: [T, k].
        chosen: int64 [T, k].
        own: [T, H], gradient g, for next tokens drawn from the model.
        text: [T, H], gradient h, for the text's next tokens.
    """

    x: torch.Tensor
    logits: torch.Tensor
    weights: torch.Tensor
    chosen: torch.Tensor
    own: torch.Tensor
    text: torch.Tensor


def observe(model: Any, ids: torch.Tensor, layers: Sequence[int], seed: int = 0) -> dict[int, Seen]:
    """Run calibration windows forward and backward, one at a time.

    Args:
        model: a Mixtral in float32; its parameters are set to need no gradient.
        ids: int64 [N, W].
        layers: which to look at.
        seed: of the drawn next tokens.
    """
    model.requires_grad_(False)
    drawn = torch.Generator().manual_seed(seed)
    parts: dict[int, list[list[torch.Tensor]]] = {layer: [] for layer in layers}
    for row in ids.to(model.device):
        seen, outputs = _forward(model, row[None], layers)
        logits = outputs.pop("logits")
        following = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=drawn)[:, 0].to(row.device)
        taken = [outputs[layer] for layer in layers]
        own = torch.autograd.grad(_score(logits, following), taken, retain_graph=True)
        # The last token's successor is not in the window, so it has no score of its own.
        text = torch.autograd.grad(_score(logits[:-1], row[1:]), taken)
        for layer, g, h in zip(layers, own, text, strict=True):
            parts[layer].append([*seen[layer], g, h])
    return {layer: Seen(*(torch.cat(column) for column in zip(*rows, strict=True))) for layer, rows in parts.items()}


def _score(logits: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    return -torch.nn.functional.cross_entropy(logits, following, reduction="sum")


def _forward(model: Any, ids: torch.Tensor, layers: Sequence[int]) -> tuple[dict[int, list[torch.Tensor]], Any]:
    """What each layer's experts were given, and by layer what they gave; `logits` [W, V] too."""
    seen: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    outputs: dict[Any, torch.Tensor] = {}
    handles = []
    for layer in layers:
        block = model.model.layers[layer].mlp

        def routed(_module: Any, inputs: Any, output: Any, layer: int = layer) -> None:
            logits, weights, chosen = output
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            seen[layer][:] = [x, logits.detach(), weights.detach(), chosen]

        def gave(_module: Any, _inputs: Any, output: Any, layer: int = layer) -> None:
            outputs[layer] = output

        handles += [block.gate.register_forward_hook(routed), block.experts.register_forward_hook(gave)]
    try:
        with torch.enable_grad():
            x = model.model.embed_tokens(ids).requires_grad_()
            outputs["logits"] = model(inputs_embeds=x, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return seen, outputs


@torch.no_grad()
def predict(experts: Any, seen: Seen) -> dict[str, dict[str, list[float]]]:
    """Change -> name of `NAMES` -> [E], of one layer.

    Args:
        experts: the layer's `MixtralExperts`.
        seen: on calibration tokens.
    """
    count, top_k = experts.num_experts, seen.chosen.shape[1]
    outputs = torch.stack([expert_output(experts, e, seen.x) for e in range(count)])
    whole = combined(outputs, seen.weights, seen.chosen)
    energy = max(float(whole.square().sum()), float(np.finfo(np.float32).tiny))
    found: dict[str, dict[str, list[float]]] = {change: {name: [] for name in NAMES} for change in CHANGES}
    for e in range(count):
        tokens, place = torch.where(seen.chosen == e)
        weight = seen.weights[tokens, place, None]
        size = float((weight * outputs[e, tokens]).square().sum()) / energy
        for change in CHANGES:
            if change == "removed":
                weights, chosen = chosen_without(seen.logits[tokens], e, top_k)
                delta = combined(outputs[:, tokens], weights, chosen) - whole[tokens]
            else:
                delta = weight * (expert_output(experts, e, seen.x[tokens], change) - outputs[e, tokens])
            for name, value in _values(delta, seen, tokens, energy).items():
                found[change][name].append(value)
            found[change]["size"].append(size)
    return found


def _values(delta: torch.Tensor, seen: Seen, tokens: torch.Tensor, energy: float) -> dict[str, float]:
    count, width = seen.x.shape
    squares = delta.square().sum(-1)
    slopes = seen.own.square().sum(-1) / width
    return {
        "own error": float(squares.sum()) / energy,
        "error x layer": float(squares.sum() * slopes.mean()) / (2 * count),
        "error x token": float((squares * slopes[tokens]).sum()) / (2 * count),
        "fisher": float((seen.own[tokens] * delta).sum(-1).square().sum()) / (2 * count),
        "slope": -float((seen.text[tokens] * delta).sum()) / count,
    }


def expert_output(experts: Any, e: int, x: torch.Tensor, change: str | None = None) -> torch.Tensor:
    """What one expert of a Mixtral gives for x [T, H], as it is or rounded."""
    up, down = experts.gate_up_proj[e], experts.down_proj[e]
    if change is not None:
        up, down = rounded(up, change), rounded(down, change)
    gate, value = torch.nn.functional.linear(x, up).chunk(2, -1)
    return torch.nn.functional.linear(experts.act_fn(gate) * value, down)


def combined(outputs: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The layer's routed output [T, H] from the outputs of all experts [E, T, H] and a routing [T, k]."""
    rows = torch.arange(outputs.shape[1])[:, None]
    return (outputs[chosen, rows] * weights[..., None].to(outputs.dtype)).sum(1)
