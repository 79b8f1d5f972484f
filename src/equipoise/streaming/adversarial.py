"""The paper's adversarial stream: the sequences that hit the heavy hitters most, in ten time steps.

R&Q (arXiv 2602.19938) tests its two streaming options on text chosen against the balance: from MMLU it finds each
layer's heavy hitters, keeps the sequences that hit them most, and cuts them into ten time steps. As a formula:

    heavy[l] = argmax_e sum_n counts[n, l, e]
    hit[n]   = mean over the layers that sequence n reached of counts[n, l, heavy[l]] / sum_e counts[n, l, e]
    kept     = the `keep` share of sequences with the largest hit, in the order of the text
    steps    = `steps` runs of kept sequences, as even in number as they can be

That sentence is a summary, not a quotation; what it leaves open is decided here and is an option or stated: the hit is
a share, so that a long sequence does not win by its length; one heavy hitter a layer (Algorithm 1 has one); a tenth is
kept; the kept stay in the order of the text, so that MMLU's subjects follow one another as in the file. Heavy hitters
and hits come from the same pass, as the choice is against this model and this text: in sample by intention.

Pure numpy; cost O(N L E).

N sequences, L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from equipoise.errors import InputError
from equipoise.streaming.trace import PARTS, Stream
from equipoise.types import FloatArray, IntArray

STEPS = 10
"""Time steps of the paper."""


@dataclass(frozen=True)
class Adversarial:
    """Which sequences make the stream.

    Attributes:
        heavy: int64 [L], each layer's heavy hitter over all sequences.
        hit: float64 [N], share of a sequence's selections that go to the heavy hitters, mean over layers.
        steps: int64 [n] sequences of each time step, in order.
    """

    heavy: IntArray
    hit: FloatArray
    steps: tuple[IntArray, ...]

    @property
    def kept(self) -> IntArray:
        """int64 [sum n], all chosen sequences, in order."""
        return np.concatenate(self.steps)


def choose_adversarial(counts: IntArray, keep: float = 0.1, steps: int = STEPS) -> Adversarial:
    """Choose the sequences; see the module.

    Args:
        counts: int [N, L, E] selections of each sequence.
        keep: share of the sequences to keep, at least one a step.
        steps: time steps.

    Raises:
        InputError: no counts of that shape, fewer sequences than steps, or an option out of range.
    """
    counts = np.asarray(counts)
    if counts.ndim != 3 or 0 in counts.shape or counts.dtype.kind not in "iu" or counts.min() < 0:
        raise InputError(
            f"counts of an adversarial stream are whole numbers [sequences, layers, experts] from 0, got "
            f"{counts.dtype} of shape {counts.shape}"
        )
    if not 0 < keep <= 1:
        raise InputError(f"keep is a share of the sequences in (0, 1], got {keep}")
    if steps < 3:
        raise InputError(f"a stream needs at least 3 steps, got {steps}")
    if len(counts) < steps:
        raise InputError(f"{len(counts)} sequences cannot be cut into {steps} steps: give more text")
    heavy = counts.sum(0).argmax(-1)
    total = counts.sum(-1)
    hits = np.take_along_axis(counts, heavy[None, :, None], -1)[..., 0]
    reached = (total > 0).sum(1)
    share = np.divide(hits, total, out=np.zeros(total.shape), where=total > 0).sum(1)
    hit = np.divide(share, reached, out=np.zeros(len(counts)), where=reached > 0)
    number = max(steps, round(keep * len(counts)))
    # Stable: of equal hits the earlier sequence.
    kept = np.sort(np.argsort(-hit, kind="stable")[:number])
    return Adversarial(heavy.astype(np.int64), hit, tuple(np.array_split(kept.astype(np.int64), steps)))


def adversarial_stream(counts: IntArray, chosen: Adversarial, slot_bytes: IntArray | None = None) -> Stream:
    """The stream of the chosen sequences: a window a time step, its sequences in parts.

    Args:
        counts: int [N, L, E] selections of each sequence.
        chosen: from `choose_adversarial` on them.
        slot_bytes: int64 [L, E] bytes of one slot, where known.
    """
    counts = np.asarray(counts, dtype=np.float64)
    parts = min(PARTS, *(len(step) for step in chosen.steps))
    windows = [
        np.stack([counts[part].sum(0) for part in np.array_split(step, parts)]) for step in chosen.steps
    ]  # fmt: skip
    return Stream(np.stack(windows), ((0, "adversarial"),), 0, slot_bytes)
