"""Table 2: balance and accuracy of the original, R&Q, the joint plan, LASER, and both; memory and speed beside them.

LIS is measured in the model at batch 1 with one new token, on prompts that calibration has not seen:

    of a prompt    LIS of each prompt, mean over prompts and layers       what a single request meets
    of the task    LIS of the selections of all prompts together, mean over layers     what a server's hour meets

A prompt of a few dozen tokens cannot be balanced by any plan made beforehand, hence both. Slots where there is a plan.

With LASER, which routes by the batch, each prompt has a forward of its own. Elsewhere prompts may share one: what a
token selects does not depend on the others, and each prompt's selections go to slots as if it were alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accuracy
import numpy as np
import prompts
import torch
from drawing import save
from prompts import TITLES
from sections import Section, interval, picture, table
from subject import QUICK_SUBJECTS, VARIANTS, Subject

import equipoise as eq
from equipoise.evaluation.paired import compare
from equipoise.models.families import MoELayer, Routing, find_layers
from equipoise.types import IntArray


def measure_lis(subject: Subject, variant: str, task: str, count: int) -> dict[str, Any]:
    """LIS of a variant on the first `count` prompts of a task after the calibration part."""
    own = subject.prompts(task)
    rows = own[prompts.calibration(len(own)) :][:count]
    with subject.variant(variant) as loaded:
        experts = find_layers(loaded.model)[0].num_experts
        layers = slot_counts(loaded.model, rows, 1 if variant.endswith("laser") else subject.rows(8))
    lis = np.array([[eq.slot_lis(counts, experts) for counts in prompt] for prompt in zip(*layers, strict=True)])
    total = float(np.mean([eq.slot_lis(counts.sum(0), experts) for counts in layers]))
    return {"prompts": len(rows), "tokens": sum(map(len, rows)), "each": lis.mean(1).tolist(), "task": total}


@torch.inference_mode()
def slot_counts(model: Any, rows: Sequence[Sequence[int]], size: int) -> list[IntArray]:
    """Selections that each slot executes of each prompt alone.

    Args:
        model: with MoE layers, balanced or not.
        rows: token ids of P prompts.
        size: prompts a forward.

    Returns:
        int64 [P, S_l] for each layer; a layer without a plan has its experts for slots.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i])) if size > 1 else list(range(len(rows)))
    found: list[list[IntArray]] = [[] for _ in find_layers(model)]
    batch: dict[str, torch.Tensor] = {}

    def observe(row: int, layer: MoELayer, routing: Routing, _real: torch.Tensor | None) -> None:
        index = routing.index.cpu().view(*batch["input_ids"].shape, -1)
        balanced: Any = getattr(layer.experts, "equipoise_slots", None)
        for own, mask in zip(index, batch["attention_mask"].cpu().bool(), strict=True):
            slots = own[mask] if balanced is None else balanced.table.assign(own[mask])
            number = layer.num_experts if balanced is None else balanced.table.num_slots
            # One more: what the family itself dropped.
            found[row].append(np.bincount(slots.numpy().ravel(), minlength=number + 1)[:number])

    with eq.watch(model, observe):
        for part in prompts.batched([rows[i] for i in order], size):
            batch = {name: tensor.to(model.device) for name, tensor in part.items()}
            model.model(**batch, use_cache=False)
    back = np.argsort(order)
    return [np.stack(counts)[back] for counts in found]


def measure_accuracy(subject: Subject, variant: str, task: str, limit: int) -> dict[str, list[float]]:
    """Right or wrong for each document, by (sub)task."""
    with subject.variant(variant) as loaded:
        packed = not variant.endswith("laser")
        rows = subject.rows(accuracy.ROWS) if packed else accuracy.ROWS
        return accuracy.answered(
            loaded, task, subject.data, limit, packed, rows, QUICK_SUBJECTS if subject.quick else 0
        )


def measure(subject: Subject) -> dict[str, Any]:
    """Every cell of the table: `lis` {variant: {task}}, `acc` {variant: {task}}, `bytes`, all plain values."""
    sizes = subject.sizes
    out: dict[str, Any] = {"lis": {}, "acc": {}, "bytes": {}, "replicas": {}, "quantized": {}}
    for variant in VARIANTS:
        wide, laser = variant in ("original", "joint"), variant.endswith("laser")
        count = sizes.lis_rerouted if laser else sizes.lis
        out["lis"][variant], out["acc"][variant] = {}, {}
        for task in prompts.TASKS:
            out["lis"][variant][task] = subject.store.cell(
                f"lis/{variant}/{task}",
                subject.inputs(count=count),
                lambda variant=variant, task=task, count=count: measure_lis(subject, variant, task, count),
            )
        for task in prompts.ACCURACY:
            limit = sizes.items if wide else sizes.rerouted if laser else sizes.others
            if task == "mmlu":
                limit = sizes.subject_items if wide else sizes.subject_rerouted if laser else sizes.subject_others
            out["acc"][variant][task] = subject.store.cell(
                f"accuracy/{variant}/{task}",
                subject.inputs(limit=limit),
                lambda variant=variant, task=task, limit=limit: measure_accuracy(subject, variant, task, limit),
            )
        plan = subject.plans.get(variant.removesuffix("+ laser").strip())
        out["bytes"][variant] = plan.budget.plan_bytes / plan.budget.original_bytes if plan else 1.0
        out["replicas"][variant] = plan.num_replicas if plan else 0
        out["quantized"][variant] = plan.num_quantized if plan else 0
    return out


def changes(values: dict[str, Any], variant: str) -> dict[str, Any]:
    """Change of the accuracy against the original by task, and `pooled`: value, low, high (points), n."""
    pairs, out = [], {}
    for task in prompts.ACCURACY:
        before, after = values["acc"]["original"].get(task), values["acc"][variant].get(task)
        if before and after:
            pair = accuracy.paired(before, after)
            pairs.append(pair)
            found = compare(*pair)
            out[task] = {"value": found.value, "low": found.low, "high": found.high, "n": found.n}
    if pairs:
        found = accuracy.pooled(pairs)
        out["pooled"] = {"value": found.value, "low": found.low, "high": found.high, "n": found.n}
    return out


def lis_of(values: dict[str, Any], variant: str, task: str, which: str) -> float | None:
    """One cell: `each` is the mean over prompts, `task` over all prompts together."""
    cell = values["lis"][variant].get(task)
    if not cell:
        return None
    return float(np.mean(cell["each"])) if which == "each" else float(cell["task"])


def mean_of(values: dict[str, Any], variant: str, which: str) -> float | None:
    """Mean over the tasks; None where one is missing."""
    found = [lis_of(values, variant, task, which) for task in prompts.TASKS]
    return None if any(x is None for x in found) else float(np.mean([x for x in found if x is not None]))


def show(value: float | None, form: str = ".2f") -> str:
    """A figure, or that there is none."""
    return "not run" if value is None else format(value, form)


def section(values: dict[str, Any], folder: Path, quick: bool) -> Section:
    """Three tables: LIS of a prompt, LIS of a task, accuracy."""
    parts = []
    for which, title in (
        ("each", "LIS of a prompt (batch 1, one new token), mean over prompts and layers"),
        ("task", "LIS of all prompts of a task together, mean over layers"),
    ):
        rows = [[TITLES[task], *(show(lis_of(values, v, task, which)) for v in VARIANTS)] for task in prompts.TASKS]
        rows.append(["**mean**", *(f"**{show(mean_of(values, v, which))}**" for v in VARIANTS)])
        parts.append(f"{title}:\n\n" + table(["task", *VARIANTS], rows))
    rows = []
    by_variant = {v: changes(values, v) for v in VARIANTS[1:]}
    for task in (*prompts.ACCURACY, "pooled"):
        row = [TITLES.get(task, "**pooled**")]
        if task == "pooled":
            row.append("")
        else:
            own = values["acc"]["original"].get(task)
            found = accuracy.measure_of(own) if own else None
            row.append(f"{100 * found.mean:.1f} (n {len(found.values)})" if found else "not run")
        for v in VARIANTS[1:]:
            one = by_variant[v].get(task)
            row.append(f"{interval(one['value'], one['low'], one['high'], 2)} (n {one['n']})" if one else "not run")
        rows.append(row)
    parts.append(
        "Accuracy of the original in percent; of the others the change in points on the same documents, 95 % paired "
        "interval:\n\n" + table(["task", "original", *VARIANTS[1:]], rows)
    )
    draw(values, folder / "table2.png")
    parts.append(picture(folder / "table2.png", "LIS of each task, original and balanced"))
    return Section("Table 2: balance and accuracy", "\n\n".join(parts))


COLOURS = {
    "original": "#9aa5b1", "paper": "#e9a23b", "joint": "#33658a", "laser": "#8e5ea2", "joint + laser": "#2a9d5c",
}  # fmt: skip


def draw(values: dict[str, Any], path: Path) -> None:
    """Bars of the LIS by task, a panel for each way of counting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), dpi=100, layout="constrained")
    for axes, which, title in zip(
        figure.subplots(2, 1, sharex=True),
        ("each", "task"),
        ("one prompt a batch", "all prompts of a task"),
        strict=True,
    ):
        at = np.arange(len(prompts.TASKS))
        for i, variant in enumerate(VARIANTS):
            heights = [lis_of(values, variant, task, which) or np.nan for task in prompts.TASKS]
            axes.bar(at + (i - 2) * 0.16, heights, 0.15, label=variant, color=COLOURS[variant])
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_ylabel("LIS (1 = as even as one slot an expert)")
        axes.set_title(title, fontsize=10)
        axes.set_xticks(at, [TITLES[task] for task in prompts.TASKS])
        axes.margins(y=0.16)
    figure.axes[0].legend(ncols=len(VARIANTS), frameon=False, loc="upper left", fontsize=9)
    save(figure, path)
