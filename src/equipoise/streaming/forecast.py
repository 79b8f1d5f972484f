"""What will the next window's load be? Many simple forecasters, blended by how well they have placed replicas.

    power mean   f[e] = (sum_i m^age(i) n_i[e]^p / sum_i m^age(i))^(1/p)      one for each memory m and power p
    recall       the same over windows that followed moments like this one, weighted by exp(-distance / scale)
    blend        F[e] = (sum_h w_h f_h[e]^q)^(1/q),   w_h ~ exp(-rate * L_h)

n_i are the shares of part i of a window (E * n / sum n). Replicas are placed to make the *largest* slot load small,
so a busy expert that is forecast too low costs and one forecast too high costs little: a power mean, between the
mean (p = 1) and the maximum (p = inf), insures against that. L_h, the loss of forecaster h, is the LIS its own
placement had in past windows relative to the mean of the forecasters', discounted; this is the exponentially
weighted forecaster of Cesa-Bianchi and Lugosi (Prediction, Learning, and Games, 2006, section 2.9 for the
discount): where the stream changes slowly long memories win, where it is restless short ones, and where regimes
come back the recall.

Drift: d = mean |n - f| of a window against the forecast made for it (memory 0.4). Where d is `drift` times its median
of the last 16 windows, the regime has changed: what all forecasters remember shrinks to the weight of
`restart` windows, so that the new regime outweighs the old at once instead of after a few windows.

A window may be observed in parts, in order (per-token traces, a live model): the last tokens of a window say most
about the next one, and short memories forget within a window too. Only what was observed is used.

Cost a window: (memories x powers + 1) water-fills of each layer, and O(windows kept x L x E) for recall.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from equipoise.streaming.moves import Spare, place
from equipoise.streaming.options import AdaptiveOptions
from equipoise.types import FloatArray


def shares(counts: FloatArray) -> FloatArray:
    """Load relative to an even one, `E * n / sum n`: [..., E] -> [..., E], zero where the layer has no load."""
    total = counts.sum(-1, keepdims=True)
    return counts * np.divide(counts.shape[-1], total, out=np.zeros_like(total), where=total > 0)


class Forecaster:
    """Forecasts of one stream: `observe` each window, then `blend` for the next.

    Attributes:
        each: [H, L, E] the forecasters' own forecasts of the next window, once a window was observed.
        weights: [H, L] their weights in the blend; sum to 1 over H.
    """

    def __init__(self, spare: Spare, options: AdaptiveOptions) -> None:
        self.options = options
        self.spare = spare
        self.each: FloatArray | None = None
        self.weights: FloatArray | None = None
        self._kinds = [(m, p) for p in options.powers for m in options.memory]
        self._sum: list[FloatArray | float] = [0.0] * len(self._kinds)
        self._mass: list[FloatArray | float] = [0.0] * len(self._kinds)
        self._loss: FloatArray | None = None
        self._surprises: deque[float] = deque(maxlen=16)
        self._key: FloatArray | None = None
        self._keys: deque[FloatArray] = deque(maxlen=options.recall_windows)
        self._followed: deque[FloatArray] = deque(maxlen=options.recall_windows)

    def observe(self, parts: FloatArray) -> None:
        """Learn from a window that is over.

        Args:
            parts: [P, L, E] selections in each part of the window, in order.
        """
        window = parts.sum(0)
        if self.each is not None:
            self._learn(window)
            if self._drifted(window):
                self._restart(self.options.restart * len(parts))
        moments = {p: shares(parts) ** p for p in self.options.powers}
        # A layer without load in a part says nothing about it: neither its sum nor its mass moves.
        heard = (parts.sum(-1, keepdims=True) > 0).astype(np.float64)
        for h, (memory, power) in enumerate(self._kinds):
            keep = memory ** (1 / len(parts))
            for part, seen in zip(moments[power], heard, strict=True):
                fade = np.where(seen > 0, keep, 1.0)
                self._sum[h] = self._sum[h] * fade + part
                self._mass[h] = self._mass[h] * fade + seen
        self.each = np.stack(
            [
                np.divide(total, mass, out=np.zeros_like(total), where=mass > 0) ** (1 / power)  # type: ignore[arg-type]
                for total, mass, (_, power) in zip(self._sum, self._mass, self._kinds, strict=True)
            ]
        )
        if self.options.recall:
            self.each = np.concatenate([self.each, self._recall()[None]])
        if self._loss is None:
            self._loss = np.zeros(self.each.shape[:2])
        raw = np.exp(-self.options.learning_rate * (self._loss - self._loss.min(0)))
        self.weights = raw / raw.sum(0)

    def blend(self) -> FloatArray:
        """[L, E] forecast of the next window's shares (a power mean: in units of an even load, not summing to E)."""
        if self.each is None or self.weights is None:
            raise RuntimeError("nothing was observed yet")
        q = self.options.blend_power
        forecast: FloatArray = np.einsum("hl,hle->le", self.weights, self.each**q) ** (1 / q)
        return forecast

    def _learn(self, window: FloatArray) -> None:
        """Charge each forecaster with the LIS that its placement had in the window that followed."""
        assert self.each is not None
        assert self._loss is not None
        if not window.any():
            return
        slots = place(self.each, self.spare)
        lis = (shares(window)[None] / slots).max(-1)
        mean = lis.mean(0)
        relative = np.divide(lis, mean, out=np.ones_like(lis), where=mean > 0) - 1
        o = self.options
        self._loss = o.forget * self._loss + o.shared * relative.mean(1, keepdims=True) + (1 - o.shared) * relative
        if o.recall and self._key is not None:
            self._keys.append(self._key)
            self._followed.append(shares(window) ** o.blend_power)

    def _drifted(self, window: FloatArray) -> bool:
        """Whether this window is much further from what was expected than windows are of late."""
        assert self.each is not None
        heard = window.sum(-1) > 0
        if not heard.any():
            return False
        usual = self.each[min(2, len(self.options.memory) - 1)]
        surprise = float(np.abs(shares(window) - usual)[heard].mean())
        drifted = len(self._surprises) > 1 and surprise > self.options.drift * float(np.median(self._surprises))
        self._surprises.append(surprise)
        return drifted

    def _restart(self, most: float) -> None:
        """Let all that is remembered weigh at most `most` parts."""
        left = [np.minimum(1.0, most / np.maximum(mass, most)) for mass in self._mass]
        self._sum = [total * part for total, part in zip(self._sum, left, strict=True)]
        self._mass = [mass * part for mass, part in zip(self._mass, left, strict=True)]

    def _recall(self) -> FloatArray:
        """[L, E] power mean of what followed moments like this one; a mean of the short past until there are two."""
        assert self.each is not None
        # The moment is described by the second shortest memory: the shortest is a few tokens and mostly noise.
        place = min(1, len(self.options.memory) - 1)
        self._key = self.each[place]
        if len(self._keys) < 2:
            return self.each[min(2, len(self.options.memory) - 1)].copy()
        distance = np.array([np.abs(self._key - key).mean() for key in self._keys])
        # Its scale is that of the nearest eighth, so it is sharp where a moment came back and flat where none did.
        near = np.sort(distance)[: max(2, len(distance) // 8)].mean()
        weight = np.exp(-(distance - distance.min()) / (near / 4 + 1e-9))
        weight /= weight.sum()
        moment = sum(w * f for w, f in zip(weight, self._followed, strict=True))
        forecast: FloatArray = np.asarray(moment) ** (1 / self.options.blend_power)
        return forecast
