"""What a gate reads of one model: right answers on the gate tasks, loss of the windows of gate text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.errors import InputError
from equipoise.evaluation.data import Batch
from equipoise.evaluation.harness import find_task_data, load_tasks, run_tasks
from equipoise.evaluation.paired import Measure, least_documents
from equipoise.evaluation.perplexity import evaluate_text
from equipoise.gating.verdict import Name, Verdict, judge
from equipoise.models.loading import LoadedModel
from equipoise.options import EvalOptions, GateOptions
from equipoise.progress import Track, quietly


@dataclass(frozen=True, eq=False)
class Reading:
    """One model's figures, item by item.

    Attributes:
        accuracy: right answers over all documents of all gate tasks; None without that bound.
        perplexity: loss of each window of gate text; None without that bound.
    """

    accuracy: Measure | None = None
    perplexity: Measure | None = None

    def against(self, original: Reading, options: GateOptions) -> tuple[Verdict, ...]:
        """The verdicts on this model, one a bound.

        Raises:
            InputError: the two readings are not of the same items.
        """
        bounds: tuple[tuple[Name, float | None], ...] = (
            ("accuracy", options.max_accuracy_drop),
            ("perplexity", options.max_perplexity_rise),
        )
        found = []
        for name, bound in bounds:
            before, after = getattr(original, name), getattr(self, name)
            if bound is not None:
                found.append(judge(name, before, after, bound))
        return tuple(found)


def check_measures(options: GateOptions, text: Sequence[Batch]) -> Path | None:
    """Refuse, before a weight is read, what a gate cannot be measured on.

    Args:
        options: with a bound.
        text: gate text; needed with a bound on perplexity.

    Returns:
        The directory of the tasks' files; None without tasks.

    Raises:
        InputError: unknown tasks, no data for them, a task without right answers, fewer documents than could ever
            show the bound, fewer than two windows of text.
    """
    if options.max_perplexity_rise is not None and sum(len(batch["input_ids"]) for batch in text) < 2:
        raise InputError("a bound on perplexity needs at least two windows of gate text, apart from the profile's")
    if options.max_accuracy_drop is None:
        return None
    directory = find_task_data(options.task_data)
    tasks = load_tasks(options.gate_tasks, directory)["tasks"]
    documents = 0
    for name, task in tasks.items():
        if not _has_share(task):
            raise InputError(f"{name} counts no right answers, so no accuracy can be gated on it: leave it out")
        size = len(task.eval_docs)
        documents += min(size, options.gate_limit or size)
    least = least_documents(options.max_accuracy_drop)
    # A metric of the task's own (truthfulqa_mc2) may be a share of each answer, whose interval can be narrower.
    if documents < 2:
        raise InputError("a bound on accuracy needs at least two documents: raise gate-limit")
    if documents < least and not any(task.get_config("process_results") for task in tasks.values()):
        raise InputError(
            f"a drop of {options.max_accuracy_drop:g} points cannot be excluded on {documents:,} documents, even if no "
            f"answer changes: give {least:,} or more (gate-tasks, gate-limit), or a larger max-accuracy-drop"
        )
    return directory


def read(
    loaded: LoadedModel,
    options: GateOptions,
    text: Sequence[Batch],
    directory: Path | None,
    batch_size: int,
    track: Track = quietly,
) -> Reading:
    """Measure a model, balanced or not.

    Args:
        loaded: with its tokenizer if there are tasks.
        options: with a bound.
        text: gate text.
        directory: of `check_measures`.
        batch_size: requests of the harness a forward pass.
        track: progress.

    Raises:
        InputError: the model's context is too short for a task that generates.
    """
    accuracy = perplexity = None
    if options.max_perplexity_rise is not None:
        result = evaluate_text(loaded.model, text, track)
        perplexity = Measure("perplexity", result.nll, result.tokens.astype(np.float64), higher_is_better=False)
    if directory is not None:
        evaluation = EvalOptions(batch_size=batch_size, limit=options.gate_limit)
        # Built anew for each model: the harness keeps the last model's answers in them.
        run = run_tasks(loaded, load_tasks(options.gate_tasks, directory), evaluation, track)
        accuracy = run.pooled()
    return Reading(accuracy, perplexity)


def _has_share(task: Any) -> bool:
    """Whether one of the task's metrics is a share of right answers (`harness._measure` decides in the same way)."""
    rules = task.aggregation()
    return any(name in ("acc", "acc_norm", "exact_match") and rule.__name__ == "mean" for name, rule in rules.items())
