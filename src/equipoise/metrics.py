"""Measures of balance: one definition each, used everywhere.

    LIS            = E * max_s load[s] / sum_e n[e]      R&Q Definition 1 (arXiv 2602.19938)
    slot imbalance = max over slots / mean over slots
    rank imbalance = max over ranks / mean over ranks

`n[e]` counts selections of expert e, so `sum_e n[e] = T * k` when no token is dropped. Without replicas the
slots are the experts. With replicas the maximum runs over slots and the denominator stays, so LIS can fall
below 1. A layer with zero load counts as balanced (1). Never mix the three: they answer different questions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from equipoise.types import FloatArray, LayerPlan

Array = npt.ArrayLike


def _ratio(top: FloatArray, bottom: FloatArray) -> FloatArray:
    """Top / bottom, 1 where bottom is 0 (a layer without load is balanced)."""
    return np.divide(top, bottom, out=np.ones_like(top, dtype=np.float64), where=bottom > 0)


def lis(counts: Array) -> FloatArray:
    """Load Imbalance Score of each layer, `E * max_e n[e] / sum_e n[e]` (R&Q Definition 1).

    Args:
        counts: [..., E] selections of each expert.

    Returns:
        float64 [...], at least 1; 1 for a layer with zero load.
    """
    n = np.asarray(counts, dtype=np.float64)
    return _ratio(n.shape[-1] * n.max(-1), n.sum(-1))


def slot_lis(slot_load: Array, num_experts: int) -> FloatArray:
    """LIS with replicas: `E * max_s load[s] / sum_s load[s]`.

    Args:
        slot_load: [..., S] tokens of each slot; they sum to the selections of the layer.
        num_experts: E, the routed experts (not the slots).

    Returns:
        float64 [...]; may be below 1 when S > E.
    """
    n = np.asarray(slot_load, dtype=np.float64)
    return _ratio(num_experts * n.max(-1), n.sum(-1))


def max_over_mean(load: Array) -> FloatArray:
    """Max / mean over the last axis: slot imbalance of [..., S], rank imbalance of [..., G]."""
    n = np.asarray(load, dtype=np.float64)
    return _ratio(n.max(-1), n.mean(-1))


def slot_load(counts: Array, layer: LayerPlan) -> FloatArray:
    """Expected tokens of each slot: the expert's selections times the slot's share.

    Args:
        counts: [..., E] selections of each expert.
        layer: the plan of the layer, S slots.

    Returns:
        float64 [..., S].
    """
    n = np.asarray(counts, dtype=np.float64)
    experts = np.array([s.expert for s in layer.slots], dtype=np.int64)
    shares = np.array([s.share for s in layer.slots], dtype=np.float64)
    return n[..., experts] * shares


def rank_load(slots: Array, layer: LayerPlan, ranks: int) -> FloatArray:
    """Tokens of each rank.

    Args:
        slots: [..., S] tokens of each slot.
        layer: the plan of the layer.
        ranks: G.

    Returns:
        float64 [..., G].
    """
    n = np.asarray(slots, dtype=np.float64)
    out = np.zeros((*n.shape[:-1], ranks))
    for s, slot in enumerate(layer.slots):
        out[..., slot.rank] += n[..., s]
    return out
