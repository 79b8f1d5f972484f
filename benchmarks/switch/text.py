"""Text of the small Switch Transformers: a tokenizer of their own, windows by document, two kinds of denoising.

Streams and hold-out are those of the reference model (`benchmarks/reference_moe/data.py`: a tenth of the documents of
each stream is held out, no evaluation item is read), plus the first megabyte of WikiText-2's train split, because the
task asks about Wikipedia.

The tokenizer is a byte-level BPE of `VOCABULARY` entries on lower-case text: WikiQA's questions have no capitals, and
a model of a few million parameters has no room for three spellings of a word. Ids: 0 padding, 1 end, then
`SENTINELS` sentinels `<extra_id_n>`, then the rest, as T5 numbers them from the other end.

    span corruption (T5, section 3.1.4)     15 % of a window's tokens in spans of 3 on average
    input       tokens with each span replaced by its sentinel, then </s>
    target      each sentinel followed by its span, then </s>

    continuation (UL2, arXiv 2205.05131, its S-denoiser)
    input       the first 24 tokens of a window, a sentinel, then </s>
    target      the sentinel, then the 56 tokens that follow

Lengths are the same for every window, so a training step has the same shapes. Span corruption alone stayed at the
frequencies of single tokens for the half million tokens that were tried; continuation teaches the decoder to write
sentences, which the task asks for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from equipoise.errors import InputError

HERE = Path(__file__).parent
TOKENIZER = HERE / "tokenizer.json"
VOCABULARY = 6144
SENTINELS = 16
PAD, END, FIRST_SENTINEL = 0, 1, 2
WINDOW = 128
NOISE, MEAN_SPAN = 0.15, 3.0
PREFIX, CONTINUATION = 24, 56
"""Tokens of a window that are given, and that are to be written."""

Ids = npt.NDArray[np.int64]


def _reference_data() -> ModuleType:
    path = HERE.parent / "reference_moe" / "data.py"
    spec = importlib.util.spec_from_file_location("reference_moe_data", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = _reference_data()
STREAMS: tuple[str, ...] = (*reference.STREAMS, "wikitext")


def documents(directory: Path, stream: str) -> list[tuple[str, bool]]:
    """The documents of a stream, each with whether it is held out, in the order of their hashes."""
    if stream != "wikitext":
        found: list[tuple[str, bool]] = reference.documents(directory, stream)
        return found
    texts = sorted(row["text"] for row in reference.rows(directory, "text_wikitext2_train_prefix"))
    return [(text, n % 10 == 0) for n, text in enumerate(texts)]


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Any:
    """A byte-level BPE on lower-case text with padding, end and sentinels: a `tokenizers.Tokenizer`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", *(f"<extra_id_{n}>" for n in range(SENTINELS))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return tokenizer


def load_tokenizer(path: Path = TOKENIZER) -> Any:
    """The tokenizer for transformers: `tokenizer(text)` ends with `</s>`.

    Raises:
        InputError: there is no such file.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist: the repository has one, and train.py --new-tokenizer makes it anew")
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path), pad_token="<pad>", eos_token="</s>",
        additional_special_tokens=[f"<extra_id_{n}>" for n in range(SENTINELS)],
    )  # fmt: skip


def tokenizer_texts(directory: Path) -> Iterator[str]:
    """What the tokenizer is trained on: the documents that are not held out, at most 2 M characters a stream."""
    for stream in STREAMS:
        left = 2_000_000
        for text, held in documents(directory, stream):
            if not held and left > 0:
                yield text[:left]
                left -= len(text)


def tokenized(directory: Path, tokenizer: Any, stream: str, held_out: bool) -> npt.NDArray[np.int32]:
    """One part of a stream, each document followed by the end token: int32 [tokens]."""
    parts: list[int] = []
    for text, held in documents(directory, stream):
        if held == held_out:
            parts.extend(tokenizer(text)["input_ids"])
    return np.array(parts, dtype=np.int32)


def noise_lengths(length: int) -> tuple[int, int]:
    """Noise tokens and spans of a window of `length` tokens, as T5 rounds them."""
    noise = min(max(round(length * NOISE), 1), length - 1)
    return noise, max(round(noise / MEAN_SPAN), 1)


def corrupted_lengths(length: int) -> tuple[int, int]:
    """Length of the input and of the target that `corrupt` makes of a window of `length` tokens."""
    noise, spans = noise_lengths(length)
    return length - noise + spans + 1, noise + spans + 1


def corrupt(window: Ids, random: np.random.Generator) -> tuple[Ids, Ids]:
    """Span corruption of one window.

    Args:
        window: int64 [length].
        random: draws the spans.

    Returns:
        input and target ids, of `corrupted_lengths(length)`.
    """
    noise, spans = noise_lengths(len(window))
    kept = _partition(len(window) - noise, spans, random)
    hidden = _partition(noise, spans, random)
    inputs: list[Ids] = []
    targets: list[Ids] = []
    place = 0
    for n, (keep, hide) in enumerate(zip(kept, hidden, strict=True)):
        sentinel = np.array([FIRST_SENTINEL + n])
        inputs += [window[place : place + keep], sentinel]
        targets += [sentinel, window[place + keep : place + keep + hide]]
        place += keep + hide
    end = np.array([END])
    return np.concatenate([*inputs, end]), np.concatenate([*targets, end])


def _partition(total: int, parts: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """`total` as the sum of `parts` positive numbers, each way equally likely: int64 [parts]."""
    cuts = np.sort(random.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def corrupted_batch(windows: Iterable[tuple[Ids, Iterable[int]]]) -> tuple[Ids, Ids]:
    """Inputs [rows, input length] and targets [rows, target length] of windows, each with the seed of its spans."""
    made = [corrupt(window, np.random.default_rng(list(seed))) for window, seed in windows]
    return np.stack([pair[0] for pair in made]), np.stack([pair[1] for pair in made])


def continued_batch(windows: Iterable[Ids]) -> tuple[Ids, Ids]:
    """Inputs [rows, PREFIX + 2] and targets [rows, CONTINUATION + 1] of windows of PREFIX + CONTINUATION tokens."""
    sentinel, end = np.array([FIRST_SENTINEL]), np.array([END])
    rows = list(windows)
    inputs = [np.concatenate([row[:PREFIX], sentinel, end]) for row in rows]
    return np.stack(inputs), np.stack([np.concatenate([sentinel, row[PREFIX:]]) for row in rows])


training_window: Callable[..., Ids] = reference.training_window
held_out_windows: Callable[..., Ids] = reference.held_out_windows
