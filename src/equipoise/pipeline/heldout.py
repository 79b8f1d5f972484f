"""One pass over held-out text: perplexity and load together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from equipoise.evaluation.data import Batch
from equipoise.evaluation.perplexity import TextResult, evaluate_text
from equipoise.metrics import slot_lis
from equipoise.profiling.watching import watch
from equipoise.progress import Track
from equipoise.types import FloatArray, IntArray


@dataclass(frozen=True)
class Heldout:
    """What one model did on held-out text. L layers, E experts, S_l slots of layer l.

    Attributes:
        text: loss of each window.
        counts: int64 [L, E] selections of each expert.
        slots: int64 [S_l] a layer, selections each slot executed.
        lis: float64 [L], over slots, counts pooled over all batches.
        batch_lis: float64 [L], mean over batches.
    """

    text: TextResult
    counts: IntArray
    slots: list[IntArray]
    lis: FloatArray
    batch_lis: FloatArray


def run_heldout(model: PreTrainedModel, batches: Sequence[Batch], track: Track, label: str) -> Heldout:
    """Score `batches` and count the load, in one pass."""
    per_batch: list[FloatArray] = []
    with watch(model) as load:
        experts = load.layers[0].num_experts
        before = load.slot_counts

        def stepwise(items: Iterable[Any], total: int | None, what: str) -> Iterator[Any]:
            nonlocal before
            for item in track(items, total, label):
                yield item
                now = load.slot_counts
                steps = [new - old for new, old in zip(now, before, strict=True)]
                per_batch.append(np.array([slot_lis(step, experts) for step in steps]))
                before = now

        text = evaluate_text(model, batches, stepwise)
        slots = load.slot_counts
        return Heldout(
            text=text,
            counts=load.counts,
            slots=slots,
            lis=np.array([float(slot_lis(s, experts)) for s in slots]),
            batch_lis=np.mean(per_batch, axis=0),
        )
