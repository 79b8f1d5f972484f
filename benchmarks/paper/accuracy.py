"""Accuracy by lm-evaluation-harness, the answers to a question scored in one row (benchmarks/reference_moe/answers.py).

Documents are the first of each task (of MMLU, the first of each subject), so that what a smaller run has answered is
the beginning of a larger one, and any two variants can be paired on what both answered.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import evaluator

from equipoise.evaluation.harness import TASKS, load_tasks
from equipoise.evaluation.harness_model import HarnessModel
from equipoise.evaluation.paired import Difference, Measure, compare, pool

ROWS = 12
"""Questions a forward on a processor, and answers a forward with LASER on any device, which routes by the batch."""


def neighbour(folder: str, name: str) -> Any:
    """A module of another benchmark's folder, whose plain name may also be one of ours."""
    path = Path(__file__).parents[1] / folder / f"{name}.py"
    known = f"_{folder}_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[known] = module
        spec.loader.exec_module(module)
    return sys.modules[known]


def answered(
    loaded: Any, task: str, data: Path, limit: int, packed: bool, rows: int = ROWS, subjects: int = 0
) -> dict[str, list[float]]:
    """Right (1) or wrong (0) for each document, by task name (of `mmlu`, by subject).

    Args:
        loaded: a `LoadedModel`.
        task: of the product's task files.
        data: directory of their rows.
        limit: documents of each task or subject, the first.
        packed: the answers to a question in one row. Not with LASER: it has to tell padding, which a packed row's
            mask does not show, and the load it routes by would be that of another batch than the harness's.
        rows: a forward.
        subjects: so many of `mmlu`'s, evenly spread (0: all).
    """
    tasks = load_tasks(members(task, subjects), data)
    kind = neighbour("reference_moe", "answers").PackedModel if packed else HarnessModel
    model = kind(loaded, rows)
    with redirect_stdout(sys.stderr):
        out: Any = evaluator.evaluate(lm=model, task_dict=tasks, limit=limit, bootstrap_iters=0, log_samples=True)
    return {
        name: [float(s["acc"]) for s in sorted(samples, key=lambda s: s["doc_id"])]
        for name, samples in out["samples"].items()
    }


def members(task: str, subjects: int) -> list[str]:
    """The task itself, or at most so many of `mmlu`'s subjects, evenly spread (0: all)."""
    if task != "mmlu" or not subjects:
        return [task]
    every = sorted(path.stem for path in TASKS.glob("mmlu/mmlu_*.yaml"))
    return every[:: -(-len(every) // subjects)]


def measure_of(values: dict[str, list[float]]) -> Measure:
    """All documents of the (sub)tasks together."""
    flat = np.array([x for own in values.values() for x in own])
    return Measure("share", flat, np.ones(len(flat)))


def paired(before: dict[str, list[float]], after: dict[str, list[float]]) -> tuple[Measure, Measure]:
    """Both on the documents that both answered."""
    names = [name for name in before if name in after]
    common = {name: min(len(before[name]), len(after[name])) for name in names}
    return tuple(measure_of({n: side[n][: common[n]] for n in names}) for side in (before, after))  # type: ignore[return-value]


def pooled(pairs: Sequence[tuple[Measure, Measure]]) -> Difference:
    """The change over all documents of several tasks."""
    return compare(pool([a for a, _ in pairs]), pool([b for _, b in pairs]))
