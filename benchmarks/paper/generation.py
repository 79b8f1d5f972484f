"""Table 9: what is written and how likely text is, for every variant: WikiText-2, code to text, TruthfulQA."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import generation_tasks as tasks
import greedy
import numpy as np
from sections import Section, interval, picture, table
from subject import VARIANTS

from equipoise.evaluation.paired import Difference, Measure, compare
from equipoise.files.atomic import atomic_file

METRICS = {
    "perplexity": ("WikiText-2, byte perplexity", False),
    "bleu": ("code to text, smoothed BLEU", True),
    "rouge": ("TruthfulQA, ROUGE-L, nearest truthful answer", True),
    "rouge_diff": ("TruthfulQA, ROUGE-L, truthful less false", True),
}
"""Metric -> title, and whether higher is better."""
WRITTEN = {"bleu": "code", "rouge": "questions"}
"""Metric -> answers it is computed from."""


def sizes(quick: bool, large: bool = False) -> dict[str, int]:
    """Items of each task, characters of an article, and new tokens of an answer."""
    if quick:
        return {"articles": 2, "characters": 200, "functions": 2, "questions": 2, "most": 6}
    number = 240 if large else 60
    return {"articles": 60, "characters": 300, "functions": number, "questions": number, "most": 20}


def measure(subject: Any) -> dict[str, Any]:
    """Every variant on the same items; each variant is kept as it is found.

    Args:
        subject: `subject.Subject`.
    """
    size = sizes(subject.quick, subject.large)
    texts = tasks.articles(subject.data, size["articles"], size["characters"])
    functions = tasks.functions(subject.data, subject.tokenizer, size["functions"])
    questions = tasks.questions(subject.data, size["questions"])
    out: dict[str, Any] = {"variants": {}, "bytes": [len(text.encode()) for text in texts]}
    for variant in VARIANTS:
        out["variants"][variant] = subject.store.cell(
            f"generation/{variant}",
            subject.inputs(sizes=size),
            lambda variant=variant: _variant(subject, variant, texts, functions, questions, size["most"]),
            [tasks, greedy],
        )
    return out | {"example": {"code": functions[0], "question": questions[0]["question"]}}


def _variant(subject: Any, variant: str, texts: Any, functions: Any, questions: Any, most: int) -> dict[str, Any]:
    with subject.variant(variant) as loaded:
        model, words = loaded.model, loaded.tokenizer
        likely = tasks.log_likelihoods(model, words, texts)
        said = tasks.code_answers(model, words, [code for code, _ in functions], most)
        answered = tasks.question_answers(model, words, questions, most)
    near = [tasks.rouge(answer, item) for answer, item in zip(answered, questions, strict=True)]
    return {
        "perplexity": likely,
        "bleu": [tasks.bleu(answer, line) for answer, (_, line) in zip(said, functions, strict=True)],
        "rouge": [truthful for truthful, _ in near],
        "rouge_diff": [difference for _, difference in near],
        "code": said,
        "questions": answered,
    }


def measured(values: dict[str, Any], variant: str, metric: str) -> Measure | None:
    """A metric of a variant, item by item; None where it could not be run."""
    found = values["variants"].get(variant)
    if not found:
        return None
    items = np.array(found[metric], dtype=np.float64)
    if metric == "perplexity":
        size = np.array(values["bytes"], dtype=np.float64)
        return Measure("perplexity", -items / size, size, higher_is_better=False)
    return Measure("mean", items, np.ones(len(items)))


def changes(values: dict[str, Any]) -> dict[tuple[str, str], Difference]:
    """By metric and variant, against the original on the same items: percent of a perplexity, else in its unit."""
    found = {}
    for metric, variant in itertools.product(METRICS, VARIANTS[1:]):
        before, after = (measured(values, name, metric) for name in ("original", variant))
        if before and after:
            found[metric, variant] = compare(before, after)
    return found


def section(values: dict[str, Any], folder: Path, quick: bool) -> Section:
    """Text, tables and a picture.

    Args:
        values: of `measure`.
        folder: where the picture goes.
        quick: whether the values are of the small form.
    """
    found = changes(values)
    rows, kept = [], []
    for metric, (title, _) in METRICS.items():
        before = measured(values, "original", metric)
        digits = 4 if metric == "perplexity" else 2
        row = [title, str(len(before.values)) if before else "", f"{before.value:.{digits}f}" if before else "not run"]
        for variant in VARIANTS[1:]:
            after, change = measured(values, variant, metric), found.get((metric, variant))
            if after is None or change is None:
                row.append("not run")
                continue
            unit = " %" if change.unit == "%" else ""
            row.append(f"{after.value:.{digits}f} ({interval(change.value, change.low, change.high, 2)}{unit})")
        rows.append(row)
        if metric in WRITTEN:
            kept.append(_unchanged(values, metric))
    path = folder / "generation.png"
    draw(found, path)
    parts = [
        "Perplexity of text, and two tasks in which the model writes: the beginnings of WikiText-2's test articles "
        "(exp of the loss a byte, lower is better); CoSQA functions without their docstring, of which the model says "
        "in one line what they do, scored against the docstring's first line; TruthfulQA's questions after the "
        "harness's six examples. Greedy; in brackets the change against the original on the same items, with its "
        "paired 95 % interval.",
        table(["task", "items", *VARIANTS], rows),
        verdict(found),
        *kept,
        _example(values),
        picture(path, "Change of each task's score by variant"),
    ]
    if quick:
        parts.insert(2, "This is the small form: a few items, and nothing to conclude from.")
    return Section("Table 9: generation", "\n\n".join(parts) + "\n")


def verdict(found: dict[tuple[str, str], Difference]) -> str:
    """What can be told from no change, and what can not."""
    worse, better, same = [], [], 0
    for (metric, variant), change in found.items():
        title, higher = METRICS[metric]
        gain = 1 if higher else -1
        said = f"{variant} on {title} ({interval(change.value, change.low, change.high, 2)}{change.unit})"
        if max(gain * change.low, gain * change.high) < 0:
            worse.append(said)
        elif min(gain * change.low, gain * change.high) > 0:
            better.append(said)
        else:
            same += 1
    parts = [f"Of {len(found)} changes, {same} cannot be told from none: their interval holds 0."]
    for words, those in (("worse", worse), ("better", better)):
        if those:
            parts.append(f"{len(those)} {'is' if len(those) == 1 else 'are'} {words}: {'; '.join(those)}.")
    chance = 0.05 * len(found)
    if worse or better:
        parts.append(f"With intervals of 95 %, about {chance:.0f} would fall outside by chance alone.")
    return " ".join(parts)


def _unchanged(values: dict[str, Any], metric: str) -> str:
    """How many answers are the original's, word for word."""
    name = WRITTEN[metric]
    before = (values["variants"].get("original") or {}).get(name)
    shares = []
    for variant in VARIANTS[1:]:
        after = (values["variants"].get(variant) or {}).get(name)
        if before and after:
            equal = sum(a == b for a, b in zip(before, after, strict=True))
            shares.append(f"{variant} {100 * equal / len(before):.0f} %")
    title = METRICS[metric][0].split(",")[0]
    return f"{title}: answers that are the original's word for word: {', '.join(shares) or 'not run'}."


def _example(values: dict[str, Any]) -> str:
    rows = []
    for variant in VARIANTS:
        found = values["variants"].get(variant)
        if found:
            rows.append([variant, *(found[name][0].replace("|", "\\|") or "(nothing)" for name in WRITTEN.values())])
    line, question = values["example"]["code"][1], values["example"]["question"]
    columns = ["first item", f"code; the docstring: {line}".replace("|", "\\|"), f"Q: {question}".replace("|", "\\|")]
    return table(columns, rows).replace("---:", "---")


def draw(found: dict[tuple[str, str], Difference], path: Path) -> None:
    """A panel a metric: change of each variant with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6), dpi=100, layout="constrained")
    grid = figure.subplots(1, len(METRICS), sharey=True)
    names = VARIANTS[1:]
    for axes, (metric, (title, higher)) in zip(grid, METRICS.items(), strict=True):
        for at, variant in enumerate(names):
            change = found.get((metric, variant))
            if change is None:
                continue
            ends = [[change.value - change.low], [change.high - change.value]]
            axes.errorbar(change.value, at, xerr=ends, fmt="o", color="#0072B2", capsize=3)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(title.replace(", ", ",\n", 1), fontsize=8)
        unit = "%" if metric == "perplexity" else "points"
        axes.set_xlabel(f"change, {unit} ({'right' if higher else 'left'} is better)", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png")
