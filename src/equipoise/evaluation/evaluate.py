"""One model evaluated on text, on tasks or on both, and two evaluations compared on the same items.

Whatever can be wrong (names of tasks, data, tokenizers that differ) is found before a model is run.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise.errors import InputError
from equipoise.evaluation.data import Window, batches, windows
from equipoise.evaluation.harness import TaskRun, load_tasks, run_tasks
from equipoise.evaluation.paired import Difference, compare
from equipoise.evaluation.perplexity import TextResult, evaluate_text, paired_difference
from equipoise.files.text import TextRecord
from equipoise.options import EvalOptions

if TYPE_CHECKING:
    from equipoise.cli.console import Track


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one model is worth.

    Attributes:
        name: the model as given.
        text: losses of the windows; None when no text was given.
        tasks: scores of the tasks; None when no tasks were given.
    """

    name: str
    text: TextResult | None
    tasks: TaskRun | None

    def to_json(self) -> dict[str, Any]:
        """`ppl`, `ppl_tokens`, `ppl_by_domain`; `tasks` {task: {metric, metric_stderr, n, fewshot}}, `pooled`."""
        out: dict[str, Any] = {}
        if self.text is not None:
            out["ppl"] = self.text.perplexity
            out["ppl_windows"] = len(self.text.tokens)
            out["ppl_tokens"] = int(self.text.tokens.sum())
            out["ppl_by_domain"] = {name: part.perplexity for name, part in self.text.by_domain().items()}
        if self.tasks is not None:
            out["tasks"] = {}
            for name, metrics in self.tasks.measures.items():
                row: dict[str, Any] = {}
                for metric, measure in metrics.items():
                    row[metric], row[f"{metric}_stderr"] = measure.value, measure.stderr
                row["n"] = len(next(iter(metrics.values())).values)
                if name in self.tasks.fewshot:
                    row["fewshot"] = self.tasks.fewshot[name]
                out["tasks"][name] = row
            pooled = self.tasks.pooled()
            if pooled is not None:
                out["pooled"] = {"acc": pooled.value, "acc_stderr": pooled.stderr, "n": len(pooled.values)}
            out["prompts_cut"] = self.tasks.cut
        return out


@dataclass(frozen=True)
class Comparison:
    """A model minus the one it is compared with, on the same items; intervals are paired 95 % ones.

    Attributes:
        ppl_percent: of perplexity, in percent of the other model's.
        ppl_absolute: of perplexity.
        domains: domain -> percent of perplexity.
        tasks: task or group -> metric -> difference.
        pooled: right answers over all documents of all tasks.
    """

    ppl_percent: Difference | None
    ppl_absolute: Difference | None
    domains: dict[str, Difference]
    tasks: dict[str, dict[str, Difference]]
    pooled: Difference | None

    def to_json(self) -> dict[str, Any]:
        """Each difference as {points | percent | difference, ci95, n}."""
        out: dict[str, Any] = {}
        if self.ppl_percent is not None and self.ppl_absolute is not None:
            out["ppl"] = _plain(self.ppl_percent) | {
                "absolute": self.ppl_absolute.value,
                "absolute_ci95": [self.ppl_absolute.low, self.ppl_absolute.high],
            }
            out["ppl_by_domain"] = {name: _plain(part) for name, part in self.domains.items()}
        if self.tasks:
            out["tasks"] = {n: {m: _plain(d) for m, d in metrics.items()} for n, metrics in self.tasks.items()}
        if self.pooled is not None:
            out["pooled"] = _plain(self.pooled)
        return out


def evaluate_models(
    names: Sequence[str],
    options: EvalOptions,
    *,
    records: Sequence[TextRecord] = (),
    tasks: Sequence[str] = (),
    task_data: Path | None = None,
    track: Track | None = None,
) -> list[Evaluation]:
    """Evaluate models one after another, never two in memory.

    Args:
        names: directories or hub ids.
        options: see `EvalOptions`.
        records: text for perplexity; may be empty.
        tasks: names of tasks; may be empty. `task_data` is needed with them.
        task_data: directory of the tasks' files.
        track: shows progress.

    Raises:
        InputError: whatever is wrong with models, text or tasks; tokenizers that differ when there is text.
    """
    from equipoise.models.loading import find_source, load_model, load_tokenizer

    sources = [find_source(name) for name in names]
    if tasks:
        if task_data is None:
            raise InputError("tasks need their data: give its directory")
        load_tasks(tasks, task_data, options.fewshot)
    cut = [_windows(load_tokenizer(source), records, options) for source in sources] if records else []
    for name, other in zip(names[1:], cut[1:], strict=False):
        if not _same(cut[0], other):
            raise InputError(
                f"{names[0]} and {name} cut the text into different tokens, so their perplexities cannot be "
                "compared; compare them on tasks, for example wikitext (perplexity of bytes)"
            )
    out = []
    for source in sources:
        loaded = load_model(source.name, dtype=options.dtype)
        text = None
        if records:
            text = evaluate_text(loaded.model, batches(cut[0], options.batch_size, loaded.model.config), track)
        run = None
        if tasks and task_data is not None:
            run = run_tasks(loaded, load_tasks(tasks, task_data, options.fewshot), options, track)
        out.append(Evaluation(source.name, text, run))
        del loaded
        gc.collect()  # modules hold themselves in cycles; the next model needs the room
    return out


def compare_evaluations(after: Evaluation, before: Evaluation) -> Comparison:
    """`after` minus `before`, item by item.

    Raises:
        InputError: they were not evaluated on the same items.
    """
    percent = absolute = pooled = None
    domains: dict[str, Difference] = {}
    tasks: dict[str, dict[str, Difference]] = {}
    if after.text is not None and before.text is not None:
        percent = _text_difference(before.text, after.text, relative=True)
        absolute = _text_difference(before.text, after.text, relative=False)
        parts = after.text.by_domain()
        domains = {n: _text_difference(b, parts[n], relative=True) for n, b in before.text.by_domain().items()}
    if after.tasks is not None and before.tasks is not None:
        for name, metrics in after.tasks.measures.items():
            tasks[name] = {m: compare(before.tasks.measures[name][m], measure) for m, measure in metrics.items()}
        all_before, all_after = before.tasks.pooled(), after.tasks.pooled()
        if all_before is not None and all_after is not None:
            pooled = compare(all_before, all_after)
    return Comparison(percent, absolute, domains, tasks, pooled)


def _windows(tokenizer: Any, records: Sequence[TextRecord], options: EvalOptions) -> list[Window]:
    made = windows(tokenizer, records, options.seq_len)
    if not options.limit or options.limit >= len(made):
        return made
    return [made[int(i)] for i in np.linspace(0, len(made) - 1, options.limit).round()]


def _same(some: Sequence[Window], others: Sequence[Window]) -> bool:
    return len(some) == len(others) and all(
        np.array_equal(a.input_ids, b.input_ids) for a, b in zip(some, others, strict=True)
    )


def _text_difference(before: TextResult, after: TextResult, *, relative: bool) -> Difference:
    value, (low, high) = paired_difference(before, after, relative=relative)
    return Difference(value, low, high, "%" if relative else "", len(before.tokens))


def _plain(difference: Difference) -> dict[str, Any]:
    name = {"points": "points", "%": "percent"}.get(difference.unit, "difference")
    return {name: difference.value, "ci95": [difference.low, difference.high], "n": difference.n}
