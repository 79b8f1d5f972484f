"""What the models are trained on: the streams' shares of a step, prepared tokens, batches by the number of a step."""

from __future__ import annotations

from pathlib import Path

import feed
import numpy as np
import pairs
import text
import torch

from equipoise.errors import InputError
from equipoise.files.atomic import atomic_file

SPANS: dict[str, int] = {
    "wikipedia": 2, "wikitext": 1, "questions": 1, "fiction": 1, "web": 1,
    "code": 1, "biomedical": 1, "legal": 1, "maths": 1,
}  # fmt: skip
"""Windows of each stream in a step, spans hidden."""
CONTINUATIONS: dict[str, int] = {"wikipedia": 4, "wikitext": 2, "questions": 2, "fiction": 1, "web": 2, "biomedical": 1}
"""Windows of each stream in a step, to be continued."""
STEP_TOKENS = sum(SPANS.values()) * text.WINDOW + sum(CONTINUATIONS.values()) * (text.PREFIX + text.CONTINUATION)


def prepare(directory: Path | None, work: Path) -> dict[str, np.ndarray]:
    """Tokens of every stream, held out and not, and the pairs; read back when they exist.

    Raises:
        InputError: they do not exist and there is no directory of text, or an earlier version made them.
    """
    path = work / "tokens.npz"
    if not path.exists():
        if directory is None:
            raise InputError(f"{path} does not exist: give --data DIR with the text files to make it")
        tokenizer = text.load_tokenizer()
        parts = {
            f"{stream}.{'held' if held else 'train'}": text.tokenized(directory, tokenizer, stream, held)
            for stream in text.STREAMS
            for held in (False, True)
        }
        parts = {name: ids.astype(np.uint16) for name, ids in parts.items()} | pairs.prepared(directory, tokenizer)
        with atomic_file(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **parts)  # type: ignore[arg-type]
    with np.load(path, allow_pickle=False) as file:
        tokens = {name: file[name] for name in file.files}
    if "sentences.train" not in tokens:
        raise InputError(f"{path} has no sentences: an earlier version made it, delete it")
    return tokens


Pair = tuple[torch.Tensor, torch.Tensor]
"""Inputs and targets, int64 [rows, input length] and [rows, target length]."""


def batches(tokens: dict[str, np.ndarray], step: int, seed: int) -> tuple[Pair, Pair]:
    """What a step trains on: spans hidden [10, 116] and [10, 26], continuations [12, 26] and [12, 57].

    A pure function of the step.
    """
    hidden, continued = [], []
    for place, (stream, number) in enumerate(SPANS.items()):
        for n in range(step * number, (step + 1) * number):
            window = text.training_window(tokens[f"{stream}.train"], text.WINDOW, n, (seed, place))
            hidden.append((window, (seed, place, n)))
    length = text.PREFIX + text.CONTINUATION
    for place, (stream, number) in enumerate(CONTINUATIONS.items(), start=len(SPANS)):
        for n in range(step * number, (step + 1) * number):
            continued.append(text.training_window(tokens[f"{stream}.train"], length, n, (seed, place)))
    return tensors(text.corrupted_batch(hidden)), tensors(text.continued_batch(continued))


def scaled_batches(
    tokens: dict[str, np.ndarray], step: int, seed: int, scale: int, chance: np.ndarray
) -> list[feed.Batch]:
    """What a step trains on at a scale: spans, continuations, pairs. A pure function of the step.

    `chance` is `feed.chances(tokens)`.
    """
    length = text.PREFIX + text.CONTINUATION
    found = []
    for streams, size, first in ((SPANS, text.WINDOW, 0), (CONTINUATIONS, length, len(SPANS))):
        rows = []
        for place, (stream, number) in enumerate(streams.items(), start=first):
            numbers = range(step * number * scale, (step + 1) * number * scale)
            rows.append(feed.windows(tokens[f"{stream}.train"], size, numbers, (seed, place)))
        found.append(np.concatenate(rows))
    random = np.random.default_rng([seed, 1, step])
    made = [tensors(feed.corrupted(found[0], random)), tensors(text.continued_batch(found[1]))]
    asked = feed.asked(tokens, "train", scale, chance, (seed, 2, step))
    return [*map(named, made), asked]


def tensors(pair: tuple[np.ndarray, np.ndarray]) -> Pair:
    """Arrays as tensors."""
    return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])


def named(pair: Pair) -> feed.Batch:
    """A pair as arguments of the model."""
    return {"input_ids": pair[0], "labels": pair[1]}
