"""Prompts of the paper's tasks, as lm-evaluation-harness builds them, and the routing of each.

The paper measures load at batch 1 with `max_new_tokens` 1: the model reads the prompt and writes one token, so the
tokens that are routed are the prompt's. Prompts are cut on the left to `LONGEST` tokens, as the harness cuts them to
a model's context. The first tenth of a task's prompts is for calibration, the rest is what is scored.

P prompts, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equipoise.evaluation.harness import load_tasks
from equipoise.profiling.recording import record_sequences
from equipoise.types import IntArray

ACCURACY = ("mmlu", "piqa", "hellaswag", "winogrande", "truthfulqa_mc1", "arc_easy", "arc_challenge")
"""Tasks with an accuracy, in the order of the paper's Table 2."""
TASKS = (*ACCURACY, "gsm8k")
TITLES = {
    "mmlu": "MMLU", "piqa": "PIQA", "hellaswag": "HellaSwag", "winogrande": "WinoGrande", "arc_easy": "ARC-easy",
    "arc_challenge": "ARC-challenge", "truthfulqa_mc1": "TruthfulQA", "gsm8k": "GSM8K",
}  # fmt: skip
LONGEST = 256
CALIBRATION = 0.1


def prompts(task: str, data: Path, tokenizer: Any, limit: int) -> list[list[int]]:
    """Token ids of a task's prompts: its first documents (of MMLU, the first of each subject), shuffled once.

    Args:
        task: of the product's task files.
        data: directory of their rows.
        tokenizer: of the model.
        limit: how many prompts.
    """
    texts: list[str] = []
    parts = load_tasks([task], data)["tasks"].values()
    for one in parts:
        one.build_all_requests(limit=-(-limit // len(parts)), rank=0, world_size=1)
        seen: set[int] = set()
        for request in one.instances:
            if request.doc_id not in seen:
                seen.add(request.doc_id)
                texts.append(request.args[0])
    # Shuffled once, so that the calibration part and the rest are of the same kind (MMLU comes subject by subject).
    order = np.random.default_rng(0).permutation(len(texts))[:limit]
    return [tokenizer(texts[i])["input_ids"][-LONGEST:] for i in order]


def padded(rows: Sequence[Sequence[int]], side: str, pad: int) -> dict[str, torch.Tensor]:
    """A batch padded to its longest on one side, `left` or `right`."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[i, at] = torch.tensor(row)
        mask[i, at] = 1
    return {"input_ids": ids, "attention_mask": mask}


def batched(rows: Sequence[Sequence[int]], size: int, pad: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """Batches in the order of `rows`, padded on the right to their longest."""
    for start in range(0, len(rows), size):
        yield padded(rows[start : start + size], "right", pad)


def routing(model: Any, rows: Sequence[Sequence[int]], size: int = 16) -> IntArray:
    """Selections of each prompt: int64 [P, L, E].

    Prompts of like length share a forward to save time; what a prompt's tokens select does not depend on the others.
    """
    order = np.argsort([len(row) for row in rows], kind="stable")
    counts = np.concatenate(list(record_sequences(model, batched([rows[i] for i in order], size))))
    out = np.empty_like(counts)
    out[order] = counts
    return out


def calibration(count: int) -> int:
    """How many of a task's prompts are for calibration."""
    return max(1, round(CALIBRATION * count))


def joined(rows: Iterable[Sequence[int]], width: int, end: int) -> list[list[int]]:
    """Prompts one after another, each followed by the token `end`, cut into windows of `width`; the rest is dropped."""
    flat = [token for row in rows for token in (*row, end)]
    return [flat[i : i + width] for i in range(0, len(flat) - width + 1, width)]
