"""`equipoise eval`: perplexity on text and lm-evaluation-harness tasks, of one model or of two side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from equipoise.cli import console
from equipoise.cli.dataclass_options import options_of, take
from equipoise.demo import heldout_text
from equipoise.errors import InputError
from equipoise.files import atomic_file, require_destination
from equipoise.files.text import read_texts
from equipoise.options import EvalOptions

if TYPE_CHECKING:
    from equipoise.evaluation.evaluate import Comparison, Evaluation
    from equipoise.evaluation.paired import Difference, Measure


@click.command("eval")
@click.argument("model", default="demo")
@click.option("--against", metavar="MODEL2", help="Compare with this model, on the same items: MODEL minus MODEL2.")
@click.option(
    "--data", multiple=True, type=click.Path(path_type=Path), help="Text: .jsonl, .jsonl.gz, .txt; may be repeated."
)
@click.option("--tasks", help="Tasks or groups: piqa,hellaswag,winogrande,truthfulqa,ai2_arc,mmlu,gsm8k,...")
@click.option(
    "--task-data",
    type=click.Path(path_type=Path),
    envvar="EQUIPOISE_TASK_DATA",
    show_envvar=True,
    help="Directory of the tasks' files (piqa_val.jsonl, mmlu_test.jsonl.gz, ...).",
)
@options_of(EvalOptions)
@click.option("--out", type=click.Path(path_type=Path), help="Write the results here too (.json).")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def command(
    model: str,
    against: str | None,
    data: tuple[Path, ...],
    tasks: str | None,
    task_data: Path | None,
    out: Path | None,
    force: bool,
    **values: Any,
) -> None:
    """Perplexity and lm-evaluation-harness tasks of MODEL (a directory or a hub id), balanced or not.

    Without MODEL, and without --data and --tasks: the bundled model, on bundled text. With --against, the
    differences come with a paired 95 % interval over windows (perplexity) or documents (tasks).

    \b
      equipoise eval
      equipoise eval demo --tasks piqa,arc_easy --task-data ../shared/data --limit 100
      equipoise eval run/model --against demo --data held_out.jsonl --out results.json
    """
    options = take(EvalOptions, values)
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if tasks is not None and not names:
        raise InputError("--tasks names no task")
    if not data and not names:
        if model != "demo" and against != "demo":
            raise InputError("nothing to evaluate on: give --data FILE or --tasks NAME,NAME")
        data = (heldout_text(),)
    if out is not None:
        require_destination(out, force)
    records = read_texts(data) if data else []

    from equipoise.evaluation.evaluate import compare_evaluations, evaluate_models
    from equipoise.evaluation.harness import find_task_data

    directory = find_task_data(task_data) if names else None
    models = [model] if against is None else [model, against]
    with console.progress() as track:
        runs = evaluate_models(models, options, records=records, tasks=names, task_data=directory, track=track)
    comparison = compare_evaluations(runs[0], runs[1]) if against is not None else None

    result: dict[str, Any] = {"model": model, **runs[0].to_json()}
    if comparison is not None:
        result |= {"against": {"model": against, **runs[1].to_json()}, "difference": comparison.to_json()}
    _text_table(runs, comparison)
    _task_table(runs, comparison)
    for run in runs:
        if run.tasks is not None and run.tasks.cut:
            console.note(
                f"note: {run.tasks.cut} prompts are longer than the context of {run.name} and were cut on the left"
            )
    if out is not None:
        with atomic_file(out) as partial:
            partial.write_text(json.dumps(console.plain(result), indent=1) + "\n", encoding="utf-8")
        result["out"] = str(out)
    console.last_line(result)


def _columns(first: str, runs: list[Evaluation]) -> tuple[str, ...]:
    names = tuple(Path(run.name).name or run.name for run in runs)
    return (first, *names, *(("difference", "95 % interval") if len(runs) > 1 else ()), "n")


def _change(difference: Difference | None) -> tuple[str, ...]:
    if difference is None:
        return ()
    unit = {"points": " points", "%": " %"}.get(difference.unit, "")
    places = 2 if difference.unit == "points" else 3
    low, high = (f"{end:+.{places}f}" for end in (difference.low, difference.high))
    interval = f"{low} to {high}" if difference.low == difference.low else "one item: none"
    return (f"{difference.value:+.{places}f}{unit}", interval)


def _text_table(runs: list[Evaluation], comparison: Comparison | None) -> None:
    texts = [run.text for run in runs if run.text is not None]
    if not texts:
        return
    domains = [text.by_domain() for text in texts]
    rows = [
        (
            name,
            *(f"{d[name].perplexity:.3f}" for d in domains),
            *_change(comparison.domains[name] if comparison else None),
            f"{len(domains[0][name].tokens)}",
        )
        for name in domains[0]
    ]
    rows.append(
        (
            "all",
            *(f"{text.perplexity:.3f}" for text in texts),
            *_change(comparison.ppl_percent if comparison else None),
            f"{len(texts[0].tokens)}",
        )
    )
    console.table("perplexity (n windows)", _columns("domain", runs), rows)


def _task_table(runs: list[Evaluation], comparison: Comparison | None) -> None:
    tasks = [run.tasks for run in runs if run.tasks is not None]
    if not tasks:
        return
    grouped = {member for members in tasks[0].groups.values() for member in members}
    rows = [
        (
            f"{name} {metric}",
            *(_score(run.measures[name][metric]) for run in tasks),
            *_change(comparison.tasks[name][metric] if comparison else None),
            f"{len(measure.values)}",
        )
        for name, metrics in tasks[0].measures.items()
        if name not in grouped
        for metric, measure in metrics.items()
    ]
    pooled = [run.pooled() for run in tasks]
    if len(tasks[0].measures) > 1 and pooled[0] is not None:
        scores = (_score(measure) for measure in pooled if measure is not None)
        n = f"{len(pooled[0].values)}"
        rows.append(("all documents acc", *scores, *_change(comparison.pooled if comparison else None), n))
    console.table("tasks (n documents, +- standard error)", _columns("task", runs), rows)


def _score(measure: Measure) -> str:
    scale = 100 if measure.kind == "share" else 1
    return f"{scale * measure.value:.2f} +- {scale * measure.stderr:.2f}"
