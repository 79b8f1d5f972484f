"""How well one ranking of experts agrees with another: Spearman's coefficient, pooled and within layers.

Bootstrap: experts are drawn anew within each layer, so a layer keeps its weight. Ties share their mean rank. Where
one of the two does not vary there is no ranking to agree with, and the coefficient is 0.

L layers, E experts, N windows, D draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

DRAWS = 1000

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """Spearman's coefficients, each with the ends of its 95 % bootstrap interval.

    Attributes:
        pooled: over all experts of all layers.
        within: mean over layers of the coefficient within a layer.
    """

    pooled: tuple[float, float, float]
    within: tuple[float, float, float]


def spearman(a: Floats, b: Floats) -> Floats:
    """Along the last axis; as `scipy.stats.spearmanr`, but 0 where an input is constant."""
    x, y = (rankdata(v, axis=-1) for v in (a, b))
    x, y = (v - v.mean(-1, keepdims=True) for v in (x, y))
    norm = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return np.divide((x * y).sum(-1), norm, out=np.zeros_like(norm), where=norm > 0)


def agreement(a: Floats, b: Floats, draws: int = DRAWS, seed: int = 0) -> Agreement:
    """Of two scores [L, E]."""
    layers, experts = a.shape
    picked = np.random.default_rng(seed).integers(0, experts, (draws, layers, experts))
    rows = np.arange(layers)[None, :, None]
    found = []
    for flat in (True, False):
        values = [_coefficient(u, v, flat) for u, v in ((a[None], b[None]), (a[rows, picked], b[rows, picked]))]
        low, high = np.quantile(values[1], (0.025, 0.975))
        found.append((float(values[0][0]), float(low), float(high)))
    return Agreement(*found)


def _coefficient(a: Floats, b: Floats, flat: bool) -> Floats:
    """Of scores [D, L, E]: [D]."""
    if flat:
        return spearman(a.reshape(len(a), -1), b.reshape(len(b), -1))
    return spearman(a, b).mean(-1)


def repeatability(truth: Floats) -> float:
    """Agreement of a truth with another measurement of it on as many windows, estimated from its two halves.

    Spearman's coefficient, pooled, of the means over even and over odd windows, raised to the full length by the
    Spearman-Brown formula 2 r / (1 + r). No predictor can be expected to agree better than about its square root.

    Args:
        truth: [L, E, N].

    Returns:
        NaN for a single window; at least -1.
    """
    if truth.shape[-1] < 2:
        return float("nan")
    r = float(spearman(truth[..., ::2].mean(-1).ravel(), truth[..., 1::2].mean(-1).ravel()))
    return max(-1.0, 2 * r / (1 + r)) if r > -1 else -1.0
