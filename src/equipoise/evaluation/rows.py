"""Rows of benchmark files in the form the harness's own tasks expect: the `custom_dataset` of our task files.

A task file names one of the functions below; the harness calls it with the directory of the data
(`task_data`, see `equipoise.evaluation.harness`) and gets `{split: datasets.Dataset}`, so nothing is looked up
on a network. Each function names its file, which may be `.jsonl` or `.jsonl.gz`, one item a line.

Where a published file is not quite the data set that the harness downloads, the difference is made good here:
HellaSwag's joined contexts and WikiText's empty lines (see `hellaswag` and `wikitext`).
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from equipoise.errors import InputError
from equipoise.files.text import read_rows

_FRAGMENT = re.compile(r"(?<=[.!?]) ([^.!?]*)$")
_HEADING = re.compile(r"^ (=(?: =)*) .* \1 $")


def mmlu(task_data: str, subject: str, **_: Any) -> dict[str, Any]:
    """MMLU, one subject: `mmlu_test` and, for few-shot prompts, `mmlu_dev`."""
    fields = ("subject", "question", "choices", "answer")
    return {
        "test": _dataset([row for row in _rows(task_data, "mmlu_test", fields) if row["subject"] == subject], subject),
        "dev": _dataset([row for row in _rows(task_data, "mmlu_dev", fields) if row["subject"] == subject], subject),
    }


def piqa(task_data: str, **_: Any) -> dict[str, Any]:
    """PIQA: `piqa_val`."""
    return {"validation": _dataset(_rows(task_data, "piqa_val", ("goal", "sol1", "sol2", "label")))}


def hellaswag(task_data: str, **_: Any) -> dict[str, Any]:
    """HellaSwag: `hellaswag_val`, cleaned up already, context and activity joined.

    The harness writes the unfinished noun phrase at the end of a context (`ctx_b`, ActivityNet items only) with
    a capital; in the joined context it is the words after the last full stop, and starts small. What cannot be
    made good: an ending whose original began with a mark such as "[title]" keeps a blank before it in the
    harness, and has none here.
    """
    rows = _rows(task_data, "hellaswag_val", ("context", "endings", "label"))
    return {
        "validation": _dataset(
            [
                {
                    "query": _FRAGMENT.sub(lambda m: " " + m.group(1).capitalize(), row["context"]),
                    "choices": row["endings"],
                    "label": str(row["label"]),
                }
                for row in rows
            ]
        )
    }


def winogrande(task_data: str, **_: Any) -> dict[str, Any]:
    """WinoGrande: `winogrande_dev`."""
    return {"validation": _dataset(_rows(task_data, "winogrande_dev", ("sentence", "option1", "option2", "answer")))}


def truthfulqa(task_data: str, **_: Any) -> dict[str, Any]:
    """TruthfulQA, multiple choice: `truthfulqa_mc`."""
    fields = ("question", "mc1_choices", "mc1_labels", "mc2_choices", "mc2_labels")
    rows = [
        {
            "question": row["question"],
            **{
                f"{name}_targets": {"choices": row[f"{name}_choices"], "labels": row[f"{name}_labels"]}
                for name in ("mc1", "mc2")
            },
        }
        for row in _rows(task_data, "truthfulqa_mc", fields)
    ]
    return {"validation": _dataset(rows)}


def arc(task_data: str, subset: str, **_: Any) -> dict[str, Any]:
    """ARC, `easy` or `challenge`: `arc_<subset>_test` and, for few-shot prompts, `arc_train`."""
    fields = ("question", "choices", "answer")
    train = [row for row in _rows(task_data, "arc_train", (*fields, "set")) if row["set"] == subset]
    return {
        "test": _dataset([_arc(row) for row in _rows(task_data, f"arc_{subset}_test", fields)]),
        "train": _dataset([_arc(row) for row in train], subset),
    }


def _arc(row: dict[str, Any]) -> dict[str, Any]:
    digits = str(row.get("answer_key") or "A").isdigit()  # some questions number their choices 1 2 3 4
    labels = ("12345678" if digits else "ABCDEFGH")[: len(row["choices"])]
    return {
        "question": row["question"],
        "choices": {"text": row["choices"], "label": list(labels)},
        "answerKey": labels[row["answer"]],
    }


def gsm8k(task_data: str, **_: Any) -> dict[str, Any]:
    """GSM8K: `gsm8k_test` and, for few-shot prompts, `gsm8k_train`."""
    fields = ("question", "answer")
    return {split: _dataset(_rows(task_data, f"gsm8k_{split}", fields)) for split in ("test", "train")}


def lambada(task_data: str, **_: Any) -> dict[str, Any]:
    """LAMBADA as OpenAI detokenized it: `lambada_test`."""
    return {"test": _dataset(_rows(task_data, "lambada_test", ("text",)))}


def wikitext(task_data: str, **_: Any) -> dict[str, Any]:
    """WikiText-2 raw test, an article a row: `text_wikitext2_test`, whose empty lines were dropped.

    They come back where the original has them, before and after each heading: 1,412 of its 1,467, so that the
    bytes that bits-per-byte divides by are 0.01 % short (0.2 % without them). Words are not affected.
    """
    pages = [{"page": _page(row["text"])} for row in _rows(task_data, "text_wikitext2_test", ("text",))]
    return {"test": _dataset(pages)}


def _page(text: str) -> str:
    lines: list[str] = []
    for line in text.splitlines():
        lines += [" ", line, " "] if _HEADING.match(line) else [line]
    # The empty line before the title ends the article before; each article here ends with its own.
    return "\n".join([*lines[1:], " "] if lines[:1] == [" "] else [*lines, " "]) + "\n"


def _dataset(rows: list[dict[str, Any]], what: str = "") -> Any:
    import datasets

    if not rows:
        raise InputError(f"the task data holds no rows for {what!r}")
    return datasets.Dataset.from_list(rows)


def _rows(task_data: str, stem: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of `<task_data>/<stem>.jsonl[.gz]`, each checked to hold the fields.

    Raises:
        InputError: no such file, or a line without one of the fields.
    """
    directory = Path(task_data)
    for path in (directory / f"{stem}.jsonl", directory / f"{stem}.jsonl.gz"):
        if path.is_file():
            return _read(path, path.stat().st_mtime_ns, fields)
    raise InputError(f"task data: {directory} holds neither {stem}.jsonl nor {stem}.jsonl.gz")


@functools.lru_cache(maxsize=4)  # MMLU's 57 subjects are one file
def _read(path: Path, _modified: int, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    for number, row in read_rows(path):
        missing = [name for name in fields if not isinstance(row, dict) or name not in row]
        if missing:
            raise InputError(f"task data {path}, line {number} has no field {missing[0]!r}")
        rows.append(row)
    return rows
