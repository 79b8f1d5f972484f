"""A predictor of an expert's worth that runs the model again: what lowering all experts of the layer at once does.

    measured layer    D[l] r[e] / sum_e r[e],    r[e] = sqrt of `error x token` of expert e

with D[l] the divergence on calibration tokens when every expert of layer l is rounded, and no other layer's. Gradients
see a change as long as it is small; where it sends tokens to other experts further on, they do not, and a layer with
many routers above it is worth more than they say. That part goes with the size of a change, not with its square, hence
the root. (There is no removal of all experts: `removed` takes the divergence of 4 bits.)

Cost: what is above the layer, once on the calibration tokens, for each layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from expert_changes import CHANGES, WEIGHTS, Bench, rounded

NAME = "measured layer"


def whole_layer(bench: Bench, change: str) -> float:
    """Mean divergence, nats a token, when all experts of the bench's layer are rounded."""
    experts = bench.model.model.layers[bench.layer].mlp.experts
    kept = {name: getattr(experts, name).data.clone() for name in WEIGHTS}
    try:
        for name, weights in kept.items():
            for e, weight in enumerate(weights):
                getattr(experts, name).data[e] = rounded(weight, change)
        return float(bench.effect().divergence.mean())
    finally:
        for name, weights in kept.items():
            getattr(experts, name).data.copy_(weights)


def measured(model: Any, ids: torch.Tensor, layer: int, errors: dict[str, list[float]]) -> dict[str, list[float]]:
    """Change -> [E], of one layer.

    Args:
        model: a Mixtral in float32.
        ids: int64 [N, W], calibration windows.
        layer: whose experts.
        errors: change -> `error x token` of each expert.
    """
    bench = Bench(model, ids, layer)
    whole = {change: whole_layer(bench, change) for change in CHANGES if change != "removed"}
    found = {}
    for change, values in errors.items():
        roots = np.sqrt(values)
        found[change] = (whole["4 bits" if change == "removed" else change] * roots / roots.sum()).tolist()
    return found
