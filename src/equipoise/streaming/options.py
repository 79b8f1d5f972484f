"""Options of the streaming balancer: one frozen dataclass, validated when built."""

from __future__ import annotations

import math
from dataclasses import dataclass

from equipoise.errors import InputError


@dataclass(frozen=True)
class AdaptiveOptions:
    """How the adaptive policy forecasts and when it moves replicas.

    The defaults were chosen on streams other than the five of `benchmarks/streaming` (docs/experiments.md).

    Attributes:
        memory: what a window is worth one window later, a forecaster each; 1 keeps all of the stream.
        powers: exponents of the power means that forecast a load, a forecaster each for every memory. 1 is the
            mean; larger ones insure against the windows in which an expert was busy.
        blend_power: exponent of the power mean over forecasters.
        learning_rate: how fast weight goes to the forecasters that were right.
        forget: what a forecaster's loss is worth one window later.
        drift: a window that is so many times further from what was expected than the median of late is a change of
            regime (inf: never).
        restart: windows that all that was remembered weighs, at most, after such a change.
        shared: share of the loss that is taken over all layers together, the rest is the layer's own.
        recall: also forecast from what followed earlier windows that looked like the latest.
        recall_windows: windows kept for recall (the memory it takes: 2 x recall_windows x L x E floats).
        move_price: predicted gain that a move must bring: LIS for moving all spare slots of a layer, as a share of the
            best LIS that the forecast says moves can reach, mean over layers.
        follow_share: over the stream, at most this share of the slots that following the last window would have
            moved (None: no such bound).
        move_bytes: at most this many bytes a step (None: no bound).
    """

    memory: tuple[float, ...] = (0.02, 0.15, 0.4, 0.7, 0.9, 1.0)
    powers: tuple[float, ...] = (2.0, 4.0)
    blend_power: float = 4.0
    learning_rate: float = 10.0
    forget: float = 0.6
    drift: float = 1.5
    restart: float = 0.2
    shared: float = 0.8
    recall: bool = True
    recall_windows: int = 256
    move_price: float = 0.3
    follow_share: float | None = 0.5
    move_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.memory or not all(0 < m <= 1 for m in self.memory):
            raise InputError(f"memory is one or more numbers in (0, 1], got {self.memory}")
        if not self.powers or not all(1 <= p <= 16 for p in (*self.powers, self.blend_power)):
            raise InputError(f"powers are numbers from 1 to 16, got {self.powers} and blend_power {self.blend_power}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise InputError(f"learning_rate must be a number from 0, got {self.learning_rate}")
        if not 0 < self.forget <= 1:
            raise InputError(f"forget must be in (0, 1], got {self.forget}")
        if not self.drift > 0:
            raise InputError(f"drift must be above 0 (inf: never), got {self.drift}")
        if not 0 < self.restart <= 1:
            raise InputError(f"restart must be in (0, 1], got {self.restart}")
        if not 0 <= self.shared <= 1:
            raise InputError(f"shared must be in [0, 1], got {self.shared}")
        if self.recall_windows < 2:
            raise InputError(f"recall_windows must be at least 2, got {self.recall_windows}")
        if not (math.isfinite(self.move_price) and self.move_price >= 0):
            raise InputError(f"move_price must be a number from 0, got {self.move_price}")
        if self.follow_share is not None and not (math.isfinite(self.follow_share) and self.follow_share >= 0):
            raise InputError(f"follow_share must be a number from 0, got {self.follow_share}")
        if self.move_bytes is not None and self.move_bytes < 0:
            raise InputError(f"move_bytes must not be negative, got {self.move_bytes}")


@dataclass(frozen=True)
class TextOptions:
    """How a text becomes the stream of a model.

    Attributes:
        seq_len: tokens a sequence: the text is cut into so many, the documents of the adversarial stream after so many.
        batch_size: sequences a forward pass.
        max_tokens: only about the first so many tokens of the text (0 = all of it).
        by_domain: the domains of the text one after the other, instead of the files as they are.
        sequences: adversarial: choose among at most so many documents, spread evenly over the text (0 = all of them).
        keep: adversarial: share of the documents that make the stream.
    """

    seq_len: int = 256
    batch_size: int = 8
    max_tokens: int = 0
    by_domain: bool = False
    sequences: int = 0
    keep: float = 0.1

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise InputError(f"seq-len must be at least 2, got {self.seq_len}")
        if self.batch_size < 1:
            raise InputError(f"batch-size must be at least 1, got {self.batch_size}")
        for name in ("max_tokens", "sequences"):
            if getattr(self, name) < 0:
                raise InputError(f"{name.replace('_', '-')} must not be negative, got {getattr(self, name)}")
        if not 0 < self.keep <= 1:
            raise InputError(f"keep is a share of the documents in (0, 1], got {self.keep}")
