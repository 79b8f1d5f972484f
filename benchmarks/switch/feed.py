"""Batches for an accelerator: `scale` times the windows of a step, by array operations, ahead of the device.

    hidden       the windows of mixture.py's SPANS, spans hidden            10 scale rows
    continued    the windows of its CONTINUATIONS, to be continued        12 scale rows
    asked        pairs of pairs.py: question to answer, and some of a sentence's tokens to the sentence
                 (QUESTIONS + SENTENCES) scale = 12 scale rows, padded as the task pads them

Windows are those of `text.training_window`, number by number; spans and deletions are drawn for a step as a whole,
so each is a pure function of (seed, step, scale) but not that of `scale` small steps. Made one window at a time, as
mixture.py's `batches` does, they would be what the device waits for.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import count
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import task
import text
import torch

QUESTIONS, SENTENCES = 2, 10
"""Rows of a step at scale 1: questions with answers, sentences with some of their tokens."""
PAIR_TOKENS = (QUESTIONS + SENTENCES) * (task.INPUT + task.TARGET)
"""Places of those rows, padding included."""
KEPT = (0.15, 0.6)
"""Least and greatest share of a sentence's tokens that is given."""
DEPTH = 4
"""Steps made ahead."""

Ids = npt.NDArray[np.int64]
Batch = dict[str, torch.Tensor]
Made = TypeVar("Made")


@lru_cache(maxsize=64)
def _order(pieces: int, length: int, seed: tuple[int, ...]) -> tuple[int, Ids]:
    """Phase and order of one pass over a stream, as `text.training_window` draws them."""
    random = np.random.default_rng(list(seed))
    return int(random.integers(length)), random.permutation(pieces)


def windows(tokens: npt.NDArray[Any], length: int, numbers: Sequence[int], seed: tuple[int, ...]) -> Ids:
    """`text.training_window` for many numbers: int64 [numbers, length]."""
    pieces = (len(tokens) - length) // length
    if pieces < 1:
        return np.stack([text.training_window(tokens, length, n, seed) for n in numbers])  # says what is wrong
    starts = []
    for turn, piece in (divmod(n, pieces) for n in numbers):
        phase, order = _order(pieces, length, (*seed, turn))
        starts.append(phase + int(order[piece]) * length)
    return tokens[np.array(starts)[:, None] + np.arange(length)].astype(np.int64)


def _partitions(rows: int, total: int, parts: int, random: np.random.Generator) -> Ids:
    """`total` as the sum of `parts` positive numbers, each way equally likely: int64 [rows, parts]."""
    chosen = np.argsort(random.random((rows, total - 1)), axis=1)[:, : parts - 1] + 1
    edges = np.zeros((rows, parts + 1), dtype=np.int64)
    edges[:, 1:-1], edges[:, -1] = np.sort(chosen, axis=1), total
    return np.diff(edges, axis=1)


def corrupted(found: Ids, random: np.random.Generator) -> tuple[Ids, Ids]:
    """`text.corrupt` for many windows [rows, length]: inputs and targets of `text.corrupted_lengths`."""
    rows, length = found.shape
    noise, spans = text.noise_lengths(length)
    parts = np.empty((rows, 2 * spans), dtype=np.int64)
    parts[:, ::2] = kept = _partitions(rows, length - noise, spans, random)
    parts[:, 1::2] = hidden = _partitions(rows, noise, spans, random)
    part = (np.cumsum(parts, 1)[:, :, None] <= np.arange(length)).sum(1)  # [rows, length], 0 to 2 spans - 1
    inputs, targets = (np.full((rows, n), text.END) for n in text.corrupted_lengths(length))
    sentinels = np.broadcast_to(text.FIRST_SENTINEL + np.arange(spans), (rows, spans))
    for out, odd, sizes in ((inputs, 0, kept), (targets, 1, hidden)):
        mine = part % 2 == odd
        place = np.arange(sizes[0].sum()) + (part[mine] // 2 + odd).reshape(rows, -1)
        np.put_along_axis(out, place, found[mine].reshape(rows, -1), 1)
        before = np.cumsum(sizes, 1) - (sizes if odd else 0)
        np.put_along_axis(out, before + np.arange(spans), sentinels, 1)
    return inputs, targets


def kept_words(sentences: Ids, chance: npt.NDArray[np.float64], random: np.random.Generator) -> Ids:
    """Some tokens of each sentence in their order, padded: int64 [rows, INPUT - 2].

    Args:
        sentences: [rows, length], padded.
        chance: [V] weights of tokens; of two, the heavier one is more often kept.
        random: draws how many and which.
    """
    real = sentences != text.PAD
    number = np.clip(np.round(random.uniform(*KEPT, len(real)) * real.sum(1)), 2, task.INPUT - 2).astype(np.int64)
    races = np.where(real, random.exponential(size=sentences.shape) / chance[sentences], np.inf)
    kept = np.argsort(np.argsort(races, 1), 1) < number[:, None]
    first = np.argsort(~kept, axis=1, kind="stable")[:, : task.INPUT - 2]
    return np.where(np.arange(task.INPUT - 2) < number[:, None], np.take_along_axis(sentences, first, 1), text.PAD)


def in_form(given: Ids, wanted: Ids) -> Batch:
    """Padded tokens [rows, INPUT - 2] and [rows, TARGET - 2] in the form of task.py, with `attention_mask`."""
    rows = np.arange(len(given))
    inputs = np.pad(given, ((0, 0), (0, 2)), constant_values=text.PAD)
    length = (given != text.PAD).sum(1)
    inputs[rows, length], inputs[rows, length + 1] = text.FIRST_SENTINEL, text.END
    labels = np.pad(wanted, ((0, 0), (1, 1)), constant_values=text.PAD)
    labels[:, 0] = text.FIRST_SENTINEL
    labels[rows, (wanted != text.PAD).sum(1) + 1] = text.END
    mask = (inputs != text.PAD).astype(np.int64)
    labels = np.where(labels == text.PAD, -100, labels)
    return {name: torch.from_numpy(value) for name, value in
            (("input_ids", inputs), ("attention_mask", mask), ("labels", labels))}  # fmt: skip


def chances(tokens: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
    """Weights of `kept_words`: a token's count in the sentences to the power -1/2, so rare words are rather kept."""
    return 1 / np.sqrt(1 + np.bincount(tokens["sentences.train"].ravel(), minlength=text.VOCABULARY))


def asked(
    tokens: Mapping[str, npt.NDArray[Any]], part: str, scale: int, chance: npt.NDArray[np.float64], seed: Sequence[int]
) -> Batch:
    """Pairs of the `train` or the `held` part in the form of the task, (QUESTIONS + SENTENCES) scale rows."""
    random = np.random.default_rng(list(seed))
    questions, answers, sentences = (
        tokens[name] for name in (f"pairs.{part}.question", f"pairs.{part}.answer", f"sentences.{part}")
    )
    which = random.integers(len(questions), size=QUESTIONS * scale)
    whole = sentences[random.integers(len(sentences), size=SENTENCES * scale)].astype(np.int64)
    given = np.concatenate([questions[which].astype(np.int64), kept_words(whole, chance, random)])
    return in_form(given, np.concatenate([answers[which].astype(np.int64), whole]))


def ahead(make: Callable[[int], Made], first: int) -> Iterator[Made]:
    """`make(first)`, `make(first + 1)`, ... from a thread that is at most `DEPTH` ahead; its errors are raised here."""
    made: queue.Queue[Made | BaseException] = queue.Queue(DEPTH)
    stop = threading.Event()

    def give(item: Made | BaseException) -> None:
        while not stop.is_set():
            try:
                made.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            for step in count(first):
                give(make(step))
                if stop.is_set():
                    return
        except BaseException as error:
            give(error)

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = made.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
