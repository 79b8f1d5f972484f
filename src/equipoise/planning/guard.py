"""A guard around robust placement: EPLB's plan is kept in every layer where windows do not show that theirs is better.

A plan from windows (`robust`) is better than EPLB's on average and can be worse where the stream changes or little was
measured. So it has to win first, on windows it has not seen. The windows are cut into up to `BLOCKS` consecutive
blocks; each is left out in turn, both plans are made from the others and scored on it:

    d[k, l] = log(rank imbalance of ours / of EPLB's)    block k, layer l; both plans made without block k

A layer's mean over a few blocks is uncertain, and layers of one model are alike, so it is drawn to the mean m over
layers as far as noise explains its distance (James-Stein; the noise v is what block and layer effects leave over):

    s = between / (between + v),   post[l] = m + s (d[l] - m),   error^2 = s v + (1 - s)^2 var(d[l]) / L

EPLB's plan is the one that would be kept: as published where its double slots are merged (`merged`, the same load on
every rank), or with those parted where replicas must share evenly (`baseline.parted`).

Layer l gets the plan from windows where  post[l] + q error < 0  and EPLB's elsewhere: also when there is too little to
judge by (one window, one layer, blocks of less than `LEAST` selections an expert). Where slots do not divide by the
ranks EPLB has no plan, and the one from windows is taken. q is as unlikely for Student's t
with L - 1 degrees of freedom as `guard` standard errors are for a normal error: few layers must agree better. A guard
of 0 never asks; an infinite one always keeps EPLB's. How the default was chosen stands in docs/experiments.md.

What it cannot do: notice a change of domain that the windows do not show. Cost: as many plans more as there are blocks.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, stdtrit

from equipoise.planning.baseline import parted, published
from equipoise.planning.merged import merge
from equipoise.planning.placement import Layout, place_layer, window_imbalance
from equipoise.planning.robust import placement_load, shrink
from equipoise.types import FloatArray, IntArray

BLOCKS = 4

LEAST = 2.0
"""Selections an expert that a left-out block must have on average: with fewer, scores show chance only."""


def baseline(total: FloatArray, windows: FloatArray, slots: int, ranks: int, *, merged: bool = True) -> Layout:
    """EPLB's plan of one layer, with the imbalance that it has in the windows.

    Args:
        total: [E] tokens, what EPLB plans by.
        windows: [W, E] tokens or fractions.
        slots: E + R on all ranks together, divisible by them.
        ranks: G.
        merged: double slots are merged, with shares; else parted, with even shares.
    """
    load = np.ascontiguousarray(total, dtype=np.float64)
    table, replicas = (published if merged else parted)(load, slots, ranks)
    imbalance = window_imbalance(table, replicas, windows)
    if not merged:
        return Layout(table, replicas, imbalance)
    table, replicas, shares = merge(table, load)
    return Layout(table, replicas, imbalance, shares)


def left_out(windows: FloatArray, slots: IntArray, ranks: int, seed: int = 0) -> tuple[FloatArray, FloatArray]:
    """Log ratio of our rank imbalance to EPLB's on blocks of windows that neither has seen.

    Plans are made without disturbed restarts, so ours is judged by slightly less than it can do.

    Args:
        windows: [W, L, E] tokens.
        slots: int64 [L] slots of each layer on all ranks together, divisible by them.
        ranks: G.
        seed: as in `placement.place_layer`.

    Returns:
        Two arrays [K, L]: against EPLB's plan with its double slots merged, and with them parted (see `baseline`). K is
        0 when the windows are too few or too small to be left out. 0 for a layer without load.
    """
    steps, layers, experts = windows.shape
    blocks = min(BLOCKS, steps, int(windows.sum((0, 2)).mean() / (LEAST * experts)))
    if blocks < 2:
        return np.zeros((0, layers)), np.zeros((0, layers))
    out = np.zeros((blocks, layers)), np.zeros((blocks, layers))
    edges = np.arange(blocks + 1) * steps // blocks
    for k in range(blocks):
        seen = np.r_[: edges[k], edges[k + 1] : steps]
        for i in range(layers):
            past, future = np.ascontiguousarray(windows[seen, i]), windows[edges[k] : edges[k + 1], i]
            if not past.any() or not future.any():
                continue
            ours = place_layer(placement_load(shrink(past)), int(slots[i]), ranks, most_kicks=0, seed=seed)
            level = window_imbalance(ours.table, ours.replicas, future)
            for gain, theirs in zip(out, (published, parted), strict=True):
                table, replicas = theirs(past.sum(0), int(slots[i]), ranks)
                gain[k, i] = math.log(level / window_imbalance(table, replicas, future))
    return out


def convinced(gain: FloatArray, guard: float) -> npt.NDArray[np.bool_]:
    """Layers in which the plan from windows is better by `guard` standard errors; see the module.

    Args:
        gain: [K, L] log ratios, below 0 where ours is better.
        guard: standard errors, at least 0; 0 asks for no evidence at all.

    Returns:
        Bool [L]; all False with fewer than two blocks or layers, unless the guard is 0.
    """
    blocks, layers = gain.shape
    if guard == 0:
        return np.ones(layers, dtype=bool)
    if blocks < 2 or layers < 2 or math.isinf(guard):
        return np.zeros(layers, dtype=bool)
    mean, of_layer = gain.mean(), gain.mean(0)
    rest = gain - gain.mean(1)[:, None] - of_layer + mean
    noise = (rest**2).sum() / ((blocks - 1) * (layers - 1)) / blocks
    spread = of_layer.var(ddof=1)
    between = max(spread - noise, 0.0)
    part = between / (between + noise) if between > 0 else 0.0
    error = math.sqrt(part * noise + (1 - part) ** 2 * spread / layers)
    quantile = float(stdtrit(layers - 1, ndtr(guard)))
    won: npt.NDArray[np.bool_] = mean + part * (of_layer - mean) + quantile * error < 0
    return won


def layers_won(
    windows: FloatArray, slots: IntArray, ranks: int, guard: float, seed: int = 0, *, merged: bool = True
) -> npt.NDArray[np.bool_]:
    """Layers that are placed by windows, bool [L]; the others get EPLB's plan.

    Args:
        windows: [W, L, E] tokens.
        slots: int64 [L].
        ranks: G.
        guard: standard errors, at least 0.
        seed: as in `placement.place_layer`.
        merged: as in `baseline`.
    """
    won: npt.NDArray[np.bool_] = slots % ranks != 0
    asked = np.flatnonzero(~won)
    if guard == 0 or math.isinf(guard) or not len(asked):
        return won | (guard == 0)
    gain = left_out(windows[:, asked], slots[asked], ranks, seed)
    won[asked] = convinced(gain[0] if merged else gain[1], guard)
    return won
