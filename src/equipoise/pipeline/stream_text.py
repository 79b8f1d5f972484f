"""A text as the stream of a model: windows of tokens as they come, or the paper's adversarial choice of documents.

The model runs batch by batch and only counts are kept, so a stream may be of any length. Routing is recorded before
a plan's slots, so a balanced model gives the stream that its original would give, but for what its precision changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from equipoise.errors import InputError
from equipoise.evaluation.data import Window, batches, windows
from equipoise.files.text import TextRecord
from equipoise.models.families import find_layers
from equipoise.profiling.recording import record_sequences, record_windows
from equipoise.progress import Track, quietly
from equipoise.runtime.sizes import slot_bytes
from equipoise.streaming.adversarial import Adversarial, adversarial_stream, choose_adversarial
from equipoise.streaming.options import TextOptions
from equipoise.streaming.trace import Stream
from equipoise.types import FloatArray, IntArray


@dataclass(frozen=True)
class TextStream:
    """Windows that the model gives while it is run over.

    Attributes:
        windows: of float64 [P, L, E] selections, in order; iterating runs the model.
        count: N, how many there will be.
        names: (window in which it begins, name) of each file or domain.
        tokens: of the text, the last short window's with them.
        slot_bytes: int64 [L, E] bytes of one slot at the original precision.
    """

    windows: Iterator[FloatArray]
    count: int
    names: tuple[tuple[int, str], ...]
    tokens: int
    slot_bytes: IntArray


def text_stream(
    model: PreTrainedModel, tokenizer: Any, records: Sequence[TextRecord], window: int, options: TextOptions
) -> TextStream:
    """Cut a text into the windows of a stream; nothing runs yet.

    Args:
        model: with MoE layers.
        tokenizer: of the model.
        records: documents in order; where their domain changes is where `names` begin.
        window: W, tokens a window.
        options: of the text.

    Raises:
        InputError: there are fewer than 3 windows of text.
    """
    if window < 1:
        raise InputError(f"window is a number of tokens and must be at least 1, got {window}")
    cut = windows(tokenizer, records, options.seq_len)
    if options.max_tokens:
        cut = cut[: max(1, math.ceil(options.max_tokens / options.seq_len))]
    ends = np.cumsum([len(item.input_ids) for item in cut])
    tokens = int(ends[-1])
    if tokens // window < 3:
        raise InputError(
            f"the text has {tokens:,} tokens, {tokens // window} windows of {window}; a stream needs at least 3: "
            "give more --data or a smaller --window"
        )
    begins = [0, *ends[:-1].tolist()]
    names = [(begin // window, item.domain) for i, (begin, item) in enumerate(zip(begins, cut, strict=True))
             if not i or item.domain != cut[i - 1].domain]  # fmt: skip
    made = batches(cut, options.batch_size, model.config)
    return TextStream(
        record_windows(model, made, window), tokens // window, tuple(names), tokens, original_slot_bytes(model)
    )


def adversarial_text(
    model: PreTrainedModel,
    tokenizer: Any,
    records: Sequence[TextRecord],
    options: TextOptions,
    track: Track = quietly,
) -> tuple[Stream, Adversarial, IntArray]:
    """The adversarial stream of a text: every document runs alone, those that hit the heavy hitters most are kept.

    Args:
        model: with MoE layers.
        tokenizer: of the model.
        records: documents in order; one of fewer than 2 tokens is passed over.
        options: of the text.
        track: progress over batches.

    Returns:
        The stream, what was chosen, and int64 [N, L, E] selections of each document.

    Raises:
        InputError: fewer documents than time steps.
    """
    if options.sequences and options.sequences < len(records):
        chosen = np.floor((np.arange(options.sequences) + 0.5) * len(records) / options.sequences).astype(int)
        records = [records[i] for i in chosen]
    # verbose=False: a document beyond the model's context is no cause for warning, it is cut here.
    encoded = tokenizer([record.text for record in records], verbose=False)["input_ids"]
    items = [
        Window(np.array(ids[: options.seq_len], dtype=np.int64), record.domain)
        for ids, record in zip(encoded, records, strict=True)
        if len(ids) > 1
    ]
    if not items:
        raise InputError("no document of the text has 2 tokens or more")
    layers = find_layers(model)
    counts = np.zeros((len(items), len(layers), layers[0].num_experts), dtype=np.int64)
    # Documents of like length share a batch, so that little of it is padding.
    order = np.argsort([len(item.input_ids) for item in items], kind="stable")
    chunks = [order[i : i + options.batch_size] for i in range(0, len(order), options.batch_size)]
    made = (batches([items[i] for i in chunk], len(chunk), model.config)[0] for chunk in chunks)
    recorded = record_sequences(model, made)
    for chunk, found in zip(chunks, track(recorded, len(chunks), "routing"), strict=True):
        counts[chunk] = found
    adversarial = choose_adversarial(counts, options.keep)
    return adversarial_stream(counts, adversarial, original_slot_bytes(model)), adversarial, counts


def original_slot_bytes(model: PreTrainedModel) -> IntArray:
    """int64 [L, E] bytes of one slot of each expert at the original precision."""
    return np.array([[slot_bytes(layer.layout, "original")] * layer.num_experts for layer in find_layers(model)])
