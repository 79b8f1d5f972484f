"""The truth about what the product's `int8` does to an expert: W8A8, where tokens are rounded as well as weights.

It is what the profile's `error` is measured for. The changes of `expert_changes` round weights alone, or more, or take
the expert away.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from expert_changes import CHANGES, Bench, Effect

from equipoise.models import find_layers
from equipoise.profiling.lowered import lowered

NAME = "W8A8"
ALL = (NAME, *CHANGES)
"""Every change that is made to one expert at a time."""


def singles(bench: Bench) -> Effect:
    """Every expert of the bench's layer, lowered alone: `Effect` of arrays [E, N]."""
    layer: Any = find_layers(bench.model)[bench.layer]
    effects = []
    for expert in range(layer.num_experts):
        with lowered(layer, "int8", [expert]):
            effects.append(bench.effect())
    return Effect(np.stack([e.divergence for e in effects]), np.stack([e.rise for e in effects]))
