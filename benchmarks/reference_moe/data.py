"""Text of the reference model: seven domains and a general stream, split by document, cut into windows.

    domain        files of the data directory                                     documents
    fiction       text_novels                                                     novels, a few long excerpts of each
    wikipedia     text_wikipedia_articles, text_wikipedia_cal                     articles
    legal         text_contracts                                                  contracts
    code          text_code_cal, webquery_test (its functions)                    files, Python functions
    biomedical    pubmedqa_labeled                                                abstracts; its own test split held out
    maths         gsm8k_train                                                     problems with worked answers
    web           text_c4_cal, text_tinystories_1000                              pages, stories
    questions     arc_train, wikipedia_qa_pairs (not a domain of its own)         questions with answers

A tenth of the documents of each (those whose SHA-1 comes first) is held out. No evaluation item is here: no test or
validation file of a task is read, and questions of `arc_train` that also stand in the ARC test files are dropped.

Windows are cut from the documents of one part joined by the end-of-text token; a window of training is drawn by
(seed, stream, number), so a resumed run sees the same text as one that was never stopped.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from equipoise.errors import InputError

DOMAINS = ("fiction", "wikipedia", "legal", "code", "biomedical", "maths", "web")
STREAMS = (*DOMAINS, "questions")
END_OF_TEXT = 0
TOKENS = "tokens.npz"
EXCERPTS, EXCERPT = 4, 30_000
"""Of a novel: how many excerpts, and their length in characters."""

Tokens = npt.NDArray[np.int32]


def rows(directory: Path, stem: str) -> Iterator[dict[str, Any]]:
    """Rows of `<stem>.jsonl` or `<stem>.jsonl.gz`.

    Raises:
        InputError: the directory has neither.
    """
    for path in (directory / f"{stem}.jsonl", directory / f"{stem}.jsonl.gz"):
        if path.exists():
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
                yield from map(json.loads, file)
            return
    raise InputError(f"{directory} has no {stem}.jsonl(.gz): give --data DIR with the text files named in data.py")


def documents(directory: Path, stream: str) -> list[tuple[str, bool]]:
    """The documents of a stream, each with whether it is held out, in the order of their hashes."""
    texts = [(text, held) for text, held in _READERS[stream](directory) if text.strip()]
    texts.sort(key=lambda item: hashlib.sha1(item[0].encode()).hexdigest())
    return [(text, n < len(texts) // 10 if held is None else held) for n, (text, held) in enumerate(texts)]


def _texts(*stems: str, key: str = "text") -> Callable[[Path], Iterator[tuple[str, bool | None]]]:
    return lambda directory: ((row[key], None) for stem in stems for row in rows(directory, stem))


def _novels(directory: Path) -> Iterator[tuple[str, bool | None]]:
    for row in rows(directory, "text_novels"):
        text = row["text"]
        step = max(len(text) // EXCERPTS, 1)
        yield "\n\n".join(text[n * step : n * step + EXCERPT] for n in range(EXCERPTS)), None


def _code(directory: Path) -> Iterator[tuple[str, bool | None]]:
    yield from _texts("text_code_cal")(directory)
    yield from _texts("webquery_test", key="code")(directory)


def _abstracts(directory: Path) -> Iterator[tuple[str, bool | None]]:
    for row in rows(directory, "pubmedqa_labeled"):
        yield "\n".join([*row["CONTEXTS"], row["LONG_ANSWER"]]), bool(row["in_test_split"])


def _maths(directory: Path) -> Iterator[tuple[str, bool | None]]:
    for row in rows(directory, "gsm8k_train"):
        yield f"{row['question']}\n{row['answer']}", None


def _questions(directory: Path) -> Iterator[tuple[str, bool | None]]:
    tested = {row["question"] for stem in ("arc_easy_test", "arc_challenge_test") for row in rows(directory, stem)}
    for row in rows(directory, "arc_train"):
        if row["question"] not in tested:
            yield f"Question: {row['question']}\nAnswer: {row['choices'][row['answer']]}", None
    for row in rows(directory, "wikipedia_qa_pairs"):
        answer = row["answer"] or ""
        if len(answer.split()) > 2:
            yield f"Question: {row['question']}\nAnswer: {answer}", None


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, bool | None]]]] = {
    "fiction": _novels,
    "wikipedia": _texts("text_wikipedia_articles", "text_wikipedia_cal"),
    "legal": _texts("text_contracts"),
    "code": _code,
    "biomedical": _abstracts,
    "maths": _maths,
    "web": _texts("text_c4_cal", "text_tinystories_1000"),
    "questions": _questions,
}


def tokenized(directory: Path, tokenizer: Any, stream: str, held_out: bool) -> Tokens:
    """One part of a stream, its documents joined by the end-of-text token: int32 [tokens].

    Args:
        directory: of the text files; or of a tokens.npz of train.py, which holds the same and is read then.
        tokenizer: of the model.
        stream: of `STREAMS`.
        held_out: the documents that training never saw, or the others.
    """
    if (directory / TOKENS).exists():
        with np.load(directory / TOKENS, allow_pickle=False) as file:
            return np.asarray(file[f"{stream}.{'held' if held_out else 'train'}"].astype(np.int32))
    texts = [text for text, held in documents(directory, stream) if held == held_out]
    # All at once: the tokenizer shares them over its threads.
    parts = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return np.array([token for own in parts for token in (END_OF_TEXT, *own)], dtype=np.int32)


def held_out_windows(tokens: Tokens, length: int, count: int) -> npt.NDArray[np.int64]:
    """`count` windows that do not overlap, spread evenly: int64 [count, length] (fewer when there are fewer)."""
    whole = tokens[: len(tokens) // length * length].reshape(-1, length)
    chosen = np.unique(np.linspace(0, len(whole) - 1, min(count, len(whole))).round().astype(int))
    return whole[chosen].astype(np.int64)


def training_window(tokens: Tokens, length: int, number: int, seed: Sequence[int]) -> npt.NDArray[np.int64]:
    """The window that a stream gives at its `number`-th turn: int64 [length].

    Each pass over the stream cuts it at another phase and takes the pieces in another order.
    """
    pieces = (len(tokens) - length) // length
    if pieces < 1:
        raise InputError(f"a stream of {len(tokens)} tokens is too short for windows of {length}")
    turn, piece = divmod(number, pieces)
    random = np.random.default_rng([*seed, turn])
    start = int(random.integers(length)) + int(random.permutation(pieces)[piece]) * length
    return tokens[start : start + length].astype(np.int64)
