"""WikiQA as text to text: a question in, a sentence of Wikipedia that answers it out, nothing in between.

    input    question <extra_id_0> </s>
    target   <extra_id_0> answer </s>            so that the task looks like the denoising the model was trained on

A pair is a question with one sentence labelled as an answer; a question with several such sentences gives several
pairs. The dev file is what is trained on (the train file is not at hand), the test file is what is scored.

    F1       of a question: token F1 of the greedy answer, best over its reference sentences, after SQuAD's
             normalisation (lower case, no punctuation, no articles); mean over questions
    load     selections of each expert of each sparse layer (encoder, then decoder) on the test pairs, answers forced,
             padding not counted; one window of load for each group of questions, so that it can be resampled
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import devices
import numpy as np
import torch
from text import END, FIRST_SENTINEL, PAD, reference

import equipoise as eq
from equipoise.types import FloatArray, IntArray

INPUT, TARGET = 24, 56
"""Tokens of an input and of a target; longer ones are cut, the end token stays."""
ROWS = 8
"""Pairs of a batch."""
NO_REPEAT = 2
"""Greedy answers do not repeat a pair of tokens: left alone, models this small write "the first the first ...", and
F1 measures the length of the loop."""


@dataclass(frozen=True)
class Question:
    """A question with the sentences that answer it."""

    text: str
    answers: tuple[str, ...]


def read(directory: Path, split: str) -> list[Question]:
    """Questions of `dev` or `test` that have an answer, in the order of the file."""
    answers: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    for row in reference.rows(directory, f"wikiqa_{split}"):
        if row["label"]:
            texts[row["question_id"]] = row["question"]
            answers.setdefault(row["question_id"], []).append(row["sentence"])
    return [Question(texts[key], tuple(found)) for key, found in answers.items()]


def _fixed(ids: Sequence[int], length: int) -> list[int]:
    cut = [*ids[: length - 1], END]
    return cut + [PAD] * (length - len(cut))


def inputs_of(questions: Sequence[str], tokenizer: Any) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, int64 [questions, INPUT]."""
    ids = [tokenizer(text)["input_ids"][:-1][: INPUT - 2] for text in questions]
    rows = torch.tensor([_fixed([*row, FIRST_SENTINEL], INPUT) for row in ids])
    return {"input_ids": rows, "attention_mask": (rows != PAD).long()}


def targets_of(answers: Sequence[str], tokenizer: Any) -> torch.Tensor:
    """Labels int64 [answers, TARGET], -100 where there is padding."""
    ids = [[FIRST_SENTINEL, *tokenizer(text)["input_ids"][:-1]] for text in answers]
    rows = torch.tensor([_fixed(row, TARGET) for row in ids])
    return rows.masked_fill(rows == PAD, -100)


def pairs(questions: Sequence[Question]) -> list[tuple[str, str]]:
    """Every question with every one of its answers."""
    return [(question.text, answer) for question in questions for answer in question.answers]


def forced(found: Sequence[tuple[str, str]], tokenizer: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of `ROWS` pairs for a forward pass with the answers given, padding masked on both sides."""
    for n in range(0, len(found), ROWS):
        part = found[n : n + ROWS]
        labels = targets_of([answer for _, answer in part], tokenizer)
        shifted = torch.cat([torch.full((len(part), 1), PAD), labels[:, :-1]], 1)
        yield {
            **inputs_of([question for question, _ in part], tokenizer),
            "decoder_input_ids": shifted.masked_fill(shifted == -100, PAD),
            "decoder_attention_mask": (labels != -100).long(),
        }


@torch.no_grad()
def load_of(model: Any, batches: Sequence[dict[str, torch.Tensor]]) -> tuple[IntArray, list[IntArray]]:
    """Load of a model, balanced or not.

    Returns:
        selections of each expert, int64 [batches, L, E]; and of each slot, L arrays int64 [batches, S_l].
    """
    model.eval()
    experts, slots = [], []
    with eq.watch(model) as load:
        for batch in batches:
            model(**devices.moved(batch, model.device))
            experts.append(load.counts)
            slots.append(load.slot_counts)
            load.reset()
    return np.stack(experts), [np.stack([step[i] for step in slots]) for i in range(len(slots[0]))]


@torch.no_grad()
def answer(model: Any, questions: Sequence[Question], tokenizer: Any, rows: int = 64) -> list[str]:
    """Greedy answers, at most `TARGET` tokens, without repeating `NO_REPEAT` tokens."""
    model.eval()
    out: list[str] = []
    for n in range(0, len(questions), rows):
        batch = inputs_of([question.text for question in questions[n : n + rows]], tokenizer)
        made = model.generate(
            **devices.moved(batch, model.device), max_new_tokens=TARGET, do_sample=False, num_beams=1,
            no_repeat_ngram_size=NO_REPEAT,
        )  # fmt: skip
        out += tokenizer.batch_decode(made.cpu(), skip_special_tokens=True)
    return [text.strip() for text in out]


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> list[str]:
    """Words of a text as SQuAD's evaluation counts them."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def token_f1(given: str, wanted: str) -> float:
    """F1 of two texts as bags of words, in [0, 1]; 1 when both are empty."""
    a, b = normalised(given), normalised(wanted)
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))


def f1(given: Sequence[str], questions: Sequence[Question]) -> FloatArray:
    """F1 of each question's answer, best over its references: float64 [questions]."""
    best = [max(token_f1(text, ref) for ref in q.answers) for text, q in zip(given, questions, strict=True)]
    return np.array(best)


def without_a_model(train: Sequence[Question], test: Sequence[Question], draws: int = 20) -> dict[str, float]:
    """F1 that needs no model: the question itself as its answer, and the answer to a random training question."""
    answers = [sentence for question in train for sentence in question.answers]
    random = np.random.default_rng(0)
    drawn = [f1([answers[i] for i in random.integers(len(answers), size=len(test))], test).mean() for _ in range(draws)]
    copied = f1([question.text for question in test], test).mean()
    return {"copy the question": float(copied), "answer of a random training question": float(np.mean(drawn))}
