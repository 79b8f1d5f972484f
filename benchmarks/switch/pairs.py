"""Pairs in the form of the task for training: questions with answers, and sentences with some of their words.

    questions    those of the stream `questions` (ARC train, Wikipedia question/answer pairs; its hold-out) and of
                 PubMedQA's training split, as WikiQA writes them: no question mark
    sentences    of the Wikipedia articles and WikiText, 8 to 54 tokens; feed.py deletes most tokens of a sentence
                 and asks for the whole (token deletion, BART, arXiv 1910.13461, section 2.2)

No evaluation item is among them: what has the question of a WikiQA test question or one of the test file's candidate
sentences, after `task.normalised`, is left out, in questions and in sentences.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import task
import text

WORDS, SENTENCE = task.INPUT - 2, task.TARGET - 2
"""Tokens of a question and of an answer at most: those of the task without sentinel and end."""
SHORTEST = 8
SENTENCE_STREAMS = ("wikipedia", "wikitext")

Rows = npt.NDArray[np.uint16]


class Unseen:
    """What must not be trained on: the questions and candidate sentences of WikiQA's test file."""

    def __init__(self, directory: Path) -> None:
        rows = list(text.reference.rows(directory, "wikiqa_test"))
        self._said = {_plain(row[key]) for row in rows for key in ("question", "sentence")}

    def allows(self, *texts: str) -> bool:
        """Whether none of the texts is a question or a sentence of the test file."""
        return not any(_plain(said) in self._said for said in texts)


def _plain(said: str) -> str:
    return " ".join(task.normalised(said))


def questions(directory: Path, held_out: bool) -> Iterator[tuple[str, str]]:
    """Questions with answers that may be trained on, or that are held out."""
    unseen = Unseen(directory)
    for question, answer, held in _questions(directory):
        question = question.strip().rstrip("?").strip()
        if held == held_out and unseen.allows(question, answer):
            yield question, answer


def _questions(directory: Path) -> Iterator[tuple[str, str, bool]]:
    for said, held in text.reference.documents(directory, "questions"):
        question, _, answer = said.removeprefix("Question: ").partition("\nAnswer: ")
        yield question, answer, held
    for row in text.reference.rows(directory, "pubmedqa_labeled"):
        if not row["in_test_split"]:
            yield row["QUESTION"], row["LONG_ANSWER"], False


def sentences(directory: Path, held_out: bool) -> Iterator[str]:
    """Sentences of encyclopedic text, by the hold-out of their documents."""
    unseen = Unseen(directory)
    for stream in SENTENCE_STREAMS:
        for document, held in text.documents(directory, stream):
            if held == held_out:
                for line in document.splitlines():
                    found = re.split(r"(?<=[.!?])\s+(?=[A-Z\"'(])", line.strip())
                    yield from (s for s in found if s.endswith((".", "!", "?")) and unseen.allows(s))


def padded(texts: Sequence[str], tokenizer: Any, length: int) -> Rows:
    """Token ids without the end token, cut or padded to `length`: uint16 [texts, length]."""
    out = np.full((len(texts), length), text.PAD, dtype=np.uint16)
    for row, ids in zip(out, tokenizer(list(texts))["input_ids"] if texts else [], strict=True):
        ids = ids[:-1][:length]
        row[: len(ids)] = ids
    return out


def prepared(directory: Path, tokenizer: Any) -> dict[str, Rows]:
    """Arrays by name: `pairs.<part>.question` [n, 22], `pairs.<part>.answer` [n, 54], `sentences.<part>` [m, 54]."""
    out: dict[str, Rows] = {}
    for part, held in (("train", False), ("held", True)):
        found = list(questions(directory, held))
        out[f"pairs.{part}.question"] = padded([question for question, _ in found], tokenizer, WORDS)
        out[f"pairs.{part}.answer"] = padded([answer for _, answer in found], tokenizer, SENTENCE)
        rows = padded(list(sentences(directory, held)), tokenizer, SENTENCE + 1)
        whole = (rows[:, -1] == text.PAD) & ((rows != text.PAD).sum(1) >= SHORTEST)
        out[f"sentences.{part}"] = rows[whole, :-1]
    return out
