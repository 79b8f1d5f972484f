"""What the balancer's tests share: a tiny model with spare slots, and windows in which one expert is busy."""

from __future__ import annotations

import numpy as np
import torch

import equipoise as eq
from core_models import batch
from equipoise.models import find_layers
from equipoise.streaming import AdaptiveOptions
from equipoise.types import Slot
from families.families_support import make_plan, own_model
from tiny import EXPERTS

FREE = AdaptiveOptions(move_price=0.0, follow_share=None)
SPARE = 4


def spare_slots(row: int, precision: str = "original") -> list[Slot]:
    """A replica, in `precision`, of each of the first four experts."""
    shares = [0.5] * SPARE + [1.0] * (EXPERTS - SPARE)
    slots = [Slot(e, share=share) for e, share in enumerate(shares)]
    return slots + [Slot(e, precision, share=0.5) for e in range(SPARE)]


def balanced(precision: str = "original", family: str = "mixtral"):
    """A tiny model of a family with those slots."""
    model = own_model(family)
    return eq.apply(model, make_plan(model, lambda row: spare_slots(row, precision)))


def skewed(model, expert: int) -> np.ndarray:
    """Counts of a window in which one expert is busy."""
    layers = len(find_layers(model))
    counts = np.full((layers, EXPERTS), 10)
    counts[:, expert] = 500
    return counts


@torch.no_grad()
def logits(model, seed: int = 0) -> torch.Tensor:
    """Logits of a batch of 4 texts, one of them half padding."""
    return model(**batch(seed=seed)).logits
