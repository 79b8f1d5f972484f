"""Routing of a text, recorded as a stream of windows or sequence by sequence.

`record_windows` cuts a text into windows of W tokens, padding left out, and each window into parts, in the order of
the text: all of a batch's first sequence, then its second. Token i of the n tokens that a layer saw of a batch stands
at position i / n of that batch's text, so the layers of an encoder and of a decoder, which see different tokens,
share the windows. `record_sequences` counts each sequence (a row of a batch) apart.

Nothing but counts is kept: a window is given out and dropped as soon as its last token was seen.

W tokens a window, P parts, L layers, E experts, B rows of a batch, Q columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from equipoise.models.families import MoELayer, Routing, find_layers
from equipoise.profiling.measure import _inputs, _runner
from equipoise.profiling.watching import watch
from equipoise.streaming.trace import PARTS, part_edges
from equipoise.types import FloatArray, IntArray

Batch = Mapping[str, torch.Tensor]
Ids = npt.NDArray[np.int64]


def text_tokens(batch: Batch) -> IntArray:
    """int64 [B] tokens of each row that are no padding, those of encoder and decoder together."""
    masks = [batch[key] for key in ("attention_mask", "decoder_attention_mask") if key in batch]
    return torch.stack([mask.sum(1) for mask in masks]).sum(0).cpu().numpy().astype(np.int64)


@torch.no_grad()
def record_windows(
    model: PreTrainedModel, batches: Iterable[Batch], window: int, parts: int = PARTS
) -> Iterator[FloatArray]:
    """Run a text through the model; yield the selections of each full window. The last, short one is dropped.

    Args:
        model: with MoE layers, balanced or not.
        batches: dicts with `input_ids` and `attention_mask` [B, Q] (and the decoder's where there is one).
        window: W.
        parts: P; W where a window has fewer tokens.

    Yields:
        float64 [P, L, E].
    """
    edges = part_edges(window, parts)
    number = len(edges) - 1
    held: dict[int, FloatArray] = {}
    position = done = 0
    for batch, seen, shape in _routed(model, batches):
        length = int(text_tokens(batch).sum())
        for row, calls in enumerate(seen):
            ids = np.concatenate([ids.reshape(-1, ids.shape[-1]) for ids in calls]) if calls else np.empty((0, 1))
            where = position + np.arange(len(ids)) * length // max(len(ids), 1)
            slot = where // window * number + np.searchsorted(edges, where % window, side="right") - 1
            for part in np.unique(slot).tolist():
                chosen = ids[slot == part].ravel()
                counts = held.setdefault(part, np.zeros(shape))
                counts[row] += np.bincount(chosen[chosen >= 0], minlength=shape[1])
        position += length
        while done < position // window:
            yield np.stack([held.pop(done * number + p, np.zeros(shape)) for p in range(number)])
            done += 1


@torch.no_grad()
def record_sequences(model: PreTrainedModel, batches: Iterable[Batch]) -> Iterator[IntArray]:
    """Run sequences through the model; yield the selections of each batch's rows.

    Args:
        model: with MoE layers, balanced or not.
        batches: dicts with `input_ids` and `attention_mask` [B, Q] (and the decoder's where there is one).

    Yields:
        int64 [B, L, E].
    """
    for batch, seen, (layers, experts) in _routed(model, batches, keep_padding=True):
        rows = len(batch["input_ids"])
        counts = np.zeros((rows, layers, experts + 1), dtype=np.int64)
        for row, calls in enumerate(seen):
            for ids in calls:
                flat = ids.reshape(rows, -1) + 1  # what does not count is -1, and comes first
                keys = flat + np.arange(rows)[:, None] * (experts + 1)
                counts[:, row] += np.bincount(keys.ravel(), minlength=rows * (experts + 1)).reshape(rows, -1)
        yield counts[..., 1:]


def _routed(
    model: PreTrainedModel, batches: Iterable[Batch], keep_padding: bool = False
) -> Iterator[tuple[Batch, list[list[Ids]], tuple[int, int]]]:
    """Forward each batch; yield it with what each layer's calls selected: int64 [rows, k], -1 for what is dropped."""
    layers = find_layers(model)
    shape = (len(layers), layers[0].num_experts)
    seen: list[list[Ids]] = [[] for _ in layers]

    def observe(row: int, layer: MoELayer, routing: Routing, real: torch.Tensor | None) -> None:
        index = routing.index.masked_fill(routing.index >= layer.num_experts, -1)
        if real is not None:
            index = index.masked_fill(~real[:, None], -1) if keep_padding else index[real]
        seen[row].append(index.cpu().numpy())

    runner = _runner(model, [layer.name for layer in layers])
    for batch in batches:
        for calls in seen:
            calls.clear()
        # Only for as long as the forward lasts: whoever iterates may run the model for other purposes in between.
        with watch(model, observe):
            runner(**_inputs(model, batch))
        yield batch, seen, shape
