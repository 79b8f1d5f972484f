"""Text to stream: documents as `equipoise.files.text` reads them, or multiple-choice questions.

A `.jsonl` file whose records have `question` and `choices` and no `text` (MMLU as published, ARC) is read as prompts in
the usual form, the choices lettered below the question; its `subject`, where it has one, is the domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from equipoise.errors import InputError
from equipoise.files.text import TextRecord, read_rows, read_texts


def read_documents(paths: Sequence[Path], by_domain: bool = False) -> list[TextRecord]:
    """Documents of all files, in order.

    Args:
        paths: .jsonl, .jsonl.gz or .txt.
        by_domain: keep each record's own domain. False: its domain is its file, whose order is then the stream's.

    Raises:
        InputError: a file is missing, empty or not what its name says; a question is malformed.
    """
    if not paths:
        raise InputError("no data file given: name at least one .jsonl, .jsonl.gz or .txt file")
    out = []
    for path in paths:
        records = _questions(path) if _holds_questions(path) else read_texts([path])
        out += records if by_domain else [TextRecord(record.text, path.name) for record in records]
    return out


def question_prompt(question: str, choices: Sequence[str]) -> str:
    """The question, its choices lettered line by line, and `Answer:`, as in MMLU's evaluation."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)]
    return "\n".join([question.strip(), *lines, "Answer:"])


def _holds_questions(path: Path) -> bool:
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        return False
    first: Any = next((row for _, row in read_rows(path)), None)
    return isinstance(first, dict) and "text" not in first and {"question", "choices"} <= first.keys()


def _questions(path: Path) -> list[TextRecord]:
    out = []
    for number, row in read_rows(path):
        where = f"data file {path}, line {number}"
        question, choices = (row.get("question"), row.get("choices")) if isinstance(row, dict) else (None, None)
        if not isinstance(question, str) or not question.strip():
            raise InputError(f"{where}: field 'question' is not a string with text")
        if not isinstance(choices, list) or not 2 <= len(choices) <= 26 or not all(isinstance(c, str) for c in choices):
            raise InputError(f"{where}: field 'choices' is not a list of 2 to 26 strings")
        domain = row.get("subject")
        out.append(TextRecord(question_prompt(question, choices), domain if isinstance(domain, str) else path.name))
    return out
