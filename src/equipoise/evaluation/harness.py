"""lm-evaluation-harness (extra `eval`) on the task files of this package: the harness itself, fully offline.

The harness builds prompts, asks the model, filters answers and scores them; here are only the task files
(`tasks/*.yaml`, metric definitions as in the harness's own), the data directory that they read, progress, and
the document-by-document values that a paired comparison needs.

A prompt longer than the model's context is cut on the left by the harness; how many were is reported.
Standard errors are `Measure.stderr`, which for means is the harness's own formula; its bootstrap of perplexities
forks a process a core and prints to stdout, and is not used.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise.errors import InputError
from equipoise.evaluation.paired import Kind, Measure, pool
from equipoise.options import EvalOptions

if TYPE_CHECKING:
    from equipoise.cli.console import Track
    from equipoise.models import LoadedModel

TASKS = Path(__file__).parent / "tasks"
DATA_VARIABLE = "EQUIPOISE_TASK_DATA"
_SEED = 1234
"""The harness's own default for few-shot examples."""


@dataclass(frozen=True, eq=False)
class TaskRun:
    """What a model scored.

    Attributes:
        measures: task, or group of tasks -> metric -> measure; `acc`, or `exact_match,strict-match` with the filter.
        groups: names that stand for several tasks (`mmlu`, `mmlu_stem`) -> those tasks.
        fewshot: task -> examples in its prompt.
        cut: prompts that were longer than the model's context and lost their beginning.
    """

    measures: dict[str, dict[str, Measure]]
    groups: dict[str, tuple[str, ...]]
    fewshot: dict[str, int]
    cut: int

    def pooled(self) -> Measure | None:
        """Right answers over all documents of all tasks, by each task's first share; None when no task has one."""
        shares = [
            next((m for m in metrics.values() if m.kind == "share"), None)
            for name, metrics in self.measures.items()
            if name not in self.groups
        ]
        found = [share for share in shares if share is not None]
        return pool(found) if found else None


def find_task_data(given: str | Path | None) -> Path:
    """The directory of the benchmark files: as given, else from the environment.

    Raises:
        InputError: neither, or not a directory.
    """
    directory = given or os.environ.get(DATA_VARIABLE)
    if not directory:
        raise InputError(
            f"tasks need their data: give --task-data DIR (or set {DATA_VARIABLE}), a directory with piqa_val.jsonl, "
            "mmlu_test.jsonl.gz and so on"
        )
    if not Path(directory).is_dir():
        raise InputError(f"task data: {directory} is not a directory")
    return Path(directory)


def load_tasks(names: Sequence[str], task_data: Path, fewshot: int | None = None) -> Any:
    """Build tasks and read their rows; nothing of a model is needed, so wrong names and files fail early.

    Args:
        names: tasks or groups (`piqa`, `mmlu`, `mmlu_virology`), also with `*`.
        task_data: directory of the rows.
        fewshot: examples in the prompt; None: as the task says. A task that fixes 0 keeps 0, as in the harness.

    Returns:
        The harness's `TaskDict`.

    Raises:
        InputError: lm_eval is not installed; an unknown name; a missing file; more examples than there are.
    """
    manager = _manager(task_data)
    wanted: list[str] = []
    for name in names:
        found = manager.match_tasks([name])
        if not found:
            known = ", ".join(n for n in manager.all_tasks if not n.startswith("mmlu_"))
            raise InputError(f"no such task: {name!r}; there are {known}, and mmlu_<subject>")
        wanted.extend(n for n in found if n not in wanted)
    try:
        with _quiet():
            tasks = manager.load(wanted)
    except ValueError as error:
        if isinstance(error, InputError) or "Duplicate task" not in str(error):
            raise
        raise InputError(f"tasks: {error}; name the group or its member, not both") from error
    for name, task in tasks["tasks"].items():
        _set_fewshot(name, task, fewshot)
    return tasks


def run_tasks(loaded: LoadedModel, tasks: Any, options: EvalOptions, track: Track | None = None) -> TaskRun:
    """Run tasks on a model.

    Args:
        loaded: model and tokenizer, on one device.
        tasks: from `load_tasks`.
        options: `batch_size` and `limit` are used here.
        track: shows progress.

    Raises:
        InputError: the model's context is too short for a task that generates.
    """
    from lm_eval import evaluator

    from equipoise.evaluation.harness_model import HarnessModel

    # stdout is for the table and the JSON line
    with _quiet(), _own_lengths(loaded.model), contextlib.redirect_stdout(sys.stderr):
        model = HarnessModel(loaded, options.batch_size, track)
        generating = [n for n, t in tasks["tasks"].items() if t.OUTPUT_TYPE == "generate_until"]
        if generating and not loaded.is_encoder_decoder and model.max_length <= model.max_gen_toks:
            raise InputError(
                f"{generating[0]} writes up to {model.max_gen_toks} tokens, but {loaded.source.name} has only "
                f"{model.max_length} positions; leave that task out"
            )
        out: Any = evaluator.evaluate(
            lm=model, task_dict=tasks, limit=options.limit or None, bootstrap_iters=0, log_samples=True
        )
    return _collect(out, tasks, model.cut)


def _manager(task_data: Path) -> Any:
    for module in ("lm_eval", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise InputError(f"tasks need {module}, which is not installed: pip install 'equipoise[eval]'")
    # The rows are local, so the hub is never asked; this also stops libraries that would count their usage there.
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    from lm_eval.tasks import TaskManager

    _compile_templates_once()
    return TaskManager(include_path=TASKS, include_defaults=False, metadata={"task_data": str(task_data)})


def _compile_templates_once() -> None:
    """Keep compiled templates: the harness compiles those of a task again for every field of every document."""
    from lm_eval import utils

    if "from_string" not in vars(utils.env):
        utils.env.from_string = functools.lru_cache(1024)(utils.env.from_string)


def _set_fewshot(name: str, task: Any, fewshot: int | None) -> None:
    """Set the examples of a prompt by the harness's rules, but refuse to take them from what is tested."""
    fixed = task.get_config("num_fewshot")
    wanted = (fixed or 0) if fewshot is None or fixed == 0 else fewshot
    source = task.get_config("fewshot_split") or task.get_config("training_split")
    have = len(task.dataset[source]) if source else 0
    if wanted > have:
        raise InputError(
            f"{name}: {wanted} examples in the prompt are wanted, but its data has {have}; lower --fewshot"
        )
    task.set_config("num_fewshot", wanted)
    task.set_fewshot_seed(_SEED)


def _collect(out: Any, tasks: Any, cut: int) -> TaskRun:
    measures: dict[str, dict[str, Measure]] = {}
    for name, task in tasks["tasks"].items():
        values: dict[str, list[Any]] = {}
        for sample in out["samples"][name]:
            for metric in sample["metrics"]:
                key = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                values.setdefault(key, []).append(sample[metric])
        measures[name] = {key: _measure(task, key.split(",")[0], items) for key, items in values.items()}
    groups = {}
    for name, group in tasks.get("groups", {}).items():
        groups[name] = tuple(task.task_name for task in group.get_all_tasks())
        members = [measures[member] for member in groups[name]]
        # The harness's groups weight by size, which is what pooling documents does.
        measures[name] = {key: pool([m[key] for m in members]) for key in members[0]}
    return TaskRun(measures, groups, {n: t.get_config("num_fewshot") for n, t in tasks["tasks"].items()}, cut)


def _measure(task: Any, metric: str, items: list[Any]) -> Measure:
    """A metric's per-document items, as the harness hands them to its aggregation, as a `Measure`."""
    aggregation: Callable[..., float] = task.aggregation()[metric]
    better = bool(task.higher_is_better()[metric])
    rule = aggregation.__name__
    if rule == "mean":
        kind: Kind = "share" if metric in ("acc", "acc_norm", "exact_match") else "mean"
        return Measure(kind, np.array(items, dtype=np.float64), np.ones(len(items)), better)
    if rule == "perplexity":
        return Measure("perplexity", -np.array(items, dtype=np.float64), np.ones(len(items)), better)
    if rule not in ("weighted_perplexity", "bits_per_byte"):
        raise InputError(f"metric {metric} of {task.task_name} is put together by {rule!r}, which cannot be paired")
    likelihood, size = np.array(items, dtype=np.float64).T
    if rule == "bits_per_byte":
        return Measure("mean", -likelihood / size / np.log(2), size, better)
    return Measure("perplexity", -likelihood / size, size, better)


@contextlib.contextmanager
def _own_lengths(model: Any) -> Iterator[None]:
    """Let the harness say how long answers may be: a checkpoint's own `max_new_tokens` would go before that."""
    config = model.generation_config
    kept = config.max_new_tokens
    config.max_new_tokens = None
    try:
        yield
    finally:
        config.max_new_tokens = kept


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the harness says on every run and what is reported here by number; pass on the rest."""
    noise = ("Custom kwargs can be passed", "`pretrained` model kwarg is not", "Passed an already-initialized")
    counted = ("Truncating ", "Left truncation applied")

    def keep(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(part in message for part in noise + counted)

    loggers = [logging.getLogger(f"lm_eval.{name}") for name in ("api.task", "models.huggingface")]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)
