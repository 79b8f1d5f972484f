"""Planning on windows of a stream instead of its total: what holds up on text that was not measured.

A plan made from the total fits the average step, and no step is average. Three things are done about it, chosen by
held-out score over the measured traces (docs/experiments.md):

1. **Shrinkage.** A window of few tokens differs from the total by chance alone. Each window's load fractions f[w]
   are drawn to the pooled ones m by the share of their spread that chance explains (James-Stein):
   f' = (1 - a) f + a m,   a = min(1, expected multinomial spread / observed spread).
2. **Power mean.** Replicas are water-filled on the load  (mean_w f'[w, e]^p)^(1/p),  p = `POWER`: the greedy that
   minimises sum_w sum_s (slot load)^p, so an expert that is busy in some windows counts nearly as in those.
3. **Placement** minimises the mean over windows of the busiest rank (`placement`), which keeps experts that are
   busy together apart. Each expert's load is first raised by `PSEUDO` of an even one: an expert that happened to be
   idle would otherwise fill its rank for nothing, and replicas be taken from it to fit what is chance.

With one window all of it is the plain total.
"""

from __future__ import annotations

import numpy as np

from equipoise.planning.kernels import compiled
from equipoise.planning.parts import window_counts
from equipoise.types import FloatArray, IntArray, Profile

POWER = 8.0

PSEUDO = 0.1

LEAST_TOKENS = 32
"""Per-token ids are cut into windows of at least so many tokens."""


def windows_of(profile: Profile, most: int) -> FloatArray:
    """The windows to plan on: steps of the series, neighbours merged; or cut from per-token ids; or the total.

    Args:
        profile: what was measured.
        most: at most so many windows.

    Returns:
        float64 [W, L, E] tokens.
    """
    series = profile.series
    if series is None and profile.topk_ids is not None and most > 1:
        tokens = len(profile.topk_ids)
        number = max(1, min(8, most, tokens // LEAST_TOKENS))
        series = window_counts(profile.topk_ids, profile.num_experts, max(1, tokens // number))
    if series is None or len(series) < 2 or most == 1:
        return profile.counts[None].astype(np.float64)
    if len(series) <= most:
        return series.astype(np.float64)
    edges = np.arange(most) * len(series) // most
    return np.add.reduceat(series, edges, axis=0).astype(np.float64)


def shrink(windows: FloatArray) -> FloatArray:
    """Load fractions of one layer, each window drawn to the pooled ones as far as chance explains its distance.

    Args:
        windows: [W, E] tokens.

    Returns:
        [W', E]; rows sum to 1. Windows without load are left out; without any load one even window is left.
    """
    total = windows.sum(1)
    busy, total = windows[total > 0], total[total > 0]
    if not len(busy):
        return np.full((1, windows.shape[1]), 1.0 / windows.shape[1])
    pooled = busy.sum(0) / total.sum()
    if len(busy) == 1:
        return pooled[None]
    fractions = busy / total[:, None]
    observed = ((fractions - pooled) ** 2).sum() / (len(busy) - 1)
    chance = float(((pooled * (1 - pooled)).sum() / total).mean())
    part = 1.0 if observed <= chance else chance / observed
    return (1 - part) * fractions + part * pooled


def effective_load(fractions: FloatArray) -> FloatArray:
    """Power mean over windows, [E] from [W, E]: what replicas are given by."""
    if len(fractions) == 1:
        return fractions[0].copy()
    top = fractions.max(0)
    scaled = np.divide(fractions, top, out=np.zeros_like(fractions), where=top > 0)
    mean: FloatArray = top * (scaled**POWER).mean(0) ** (1.0 / POWER)
    return mean


def placement_load(fractions: FloatArray) -> FloatArray:
    """What slots are placed by, [W, E]: with several windows, raised by a part of an even load; the total as it is."""
    if len(fractions) == 1:
        return fractions
    return (fractions + PSEUDO / fractions.shape[1]) / (1 + PSEUDO)


@compiled
def lis_curve(order: IntArray, fractions: FloatArray) -> FloatArray:
    """Predicted LIS while replicas are given one by one: mean over windows of E * max_e fraction / slots.

    Args:
        order: int64 [R] experts in the order in which they get replicas.
        fractions: [W, E].

    Returns:
        [R + 1], never rising.
    """
    windows, experts = fractions.shape
    share = fractions.copy()
    r = np.ones(experts, dtype=np.int64)
    # Each window's busiest expert; only when that one is given a replica must the window be looked at again.
    top = np.empty(windows, dtype=np.int64)
    for w in range(windows):
        top[w] = share[w].argmax()
    out = np.empty(order.shape[0] + 1)
    for step in range(order.shape[0] + 1):
        total = 0.0
        for w in range(windows):
            total += share[w, top[w]]
        out[step] = experts * total / windows
        if step == order.shape[0]:
            break
        e = order[step]
        r[e] += 1
        for w in range(windows):
            share[w, e] = fractions[w, e] / r[e]
            if top[w] == e:
                top[w] = share[w].argmax()
    return out
