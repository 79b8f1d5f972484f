"""Figure 7: how far apart the loads of a layer's experts are, before and after.

Loads of a layer's slots (experts, where there are no replicas), in multiples of an even share of the original:

    u[s] = E * load[s] / sum_e n[e]       sorted from the busiest; u of the busiest is the LIS
    gap  = u[busiest] - u[least busy]
    step = u[busiest] - u[second busiest]

The paper's text was not at hand where this was written, so its definition may differ in scale. Counts of the prompts
that calibration has not seen, a task at a time, mean over tasks.

L layers, E experts, S slots of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import prompts
from drawing import COLOURS, LABELS, MARKERS, canvas, capital, save
from sections import Section, picture, table
from subject import Subject

from equipoise.metrics import slot_load
from equipoise.types import FloatArray, IntArray, Plan

VARIANTS = ("raw", "paper", "joint")


def loads(counts: IntArray, plan: Plan | None) -> list[FloatArray]:
    """Sorted slot loads of each layer in multiples of an even share, from the busiest: L arrays of [S].

    Args:
        counts: int64 [L, E] selections.
        plan: None for the model as it is.
    """
    out = []
    for i, n in enumerate(counts):
        own = n.astype(np.float64) if plan is None else slot_load(n, plan.layers[i])
        out.append(np.sort(len(n) * own / max(n.sum(), 1))[::-1])
    return out


def measure_counts(rest: Mapping[str, IntArray], plans: Mapping[str, Plan]) -> dict[str, Any]:
    """Gaps and steps [L] and sorted loads of each variant, mean over tasks; rest: task -> int64 [P, L, E]."""
    out: dict[str, Any] = {}
    for name in VARIANTS:
        made = [loads(counts.sum(0), plans.get(name)) for counts in rest.values()]
        widest = max(len(own) for own in made[0])
        # A layer with fewer slots than another has none at the end: NaN there, left out of the mean.
        padded = np.array([[np.pad(u, (0, widest - len(u)), constant_values=np.nan) for u in task] for task in made])
        out[name] = {
            "gap": [float(np.mean([task[i][0] - task[i][-1] for task in made])) for i in range(len(made[0]))],
            "step": [float(np.mean([task[i][0] - task[i][1] for task in made])) for i in range(len(made[0]))],
            "busiest": [float(np.mean([task[i][0] for task in made])) for i in range(len(made[0]))],
            "least": [float(np.mean([task[i][-1] for task in made])) for i in range(len(made[0]))],
            "sorted": np.nanmean(padded, axis=(0, 1)).tolist(),
            "tasks": {task: float(np.mean([u[0] - u[-1] for u in own])) for task, own in zip(rest, made, strict=True)},
        }
    return out


def measure(subject: Subject) -> dict[str, Any]:
    """From recorded counts."""
    return measure_counts({task: subject.rest(task) for task in prompts.TASKS}, subject.plans)


def verdict(values: dict[str, Any]) -> str:
    """What the figures say."""
    gap = {name: float(np.mean(values[name]["gap"])) for name in VARIANTS}
    said = [f"The gap between the busiest and the least busy is {gap['raw']:.2f} even shares in the model as it is, "
            f"{gap['paper']:.2f} with R&Q ({gap['paper'] / gap['raw'] - 1:+.0%}) and {gap['joint']:.2f} with joint "
            f"({gap['joint'] / gap['raw'] - 1:+.0%})."]  # fmt: skip
    for name in ("paper", "joint"):
        smaller = sum(b < a - 1e-9 for a, b in zip(values["raw"]["gap"], values[name]["gap"], strict=True))
        said.append(f"{capital(LABELS[name])} narrows it in {smaller} of "
                    f"{len(values['raw']['gap'])} layers.")  # fmt: skip
    least = {name: float(np.mean(values[name]["least"])) for name in VARIANTS}
    if all(abs(least[name] - least["raw"]) < 0.02 for name in VARIANTS):
        said.append("All of it comes from the top: the least busy expert's load is the same.")
    elif least["joint"] < least["raw"]:
        said.append(f"With joint the least busy slot has less as well ({least['joint']:.2f} instead of "
                    f"{least['raw']:.2f} even shares), because it replicates more experts than the busiest; so the gap "
                    "shrinks by less than the busiest's load does.")  # fmt: skip
    return " ".join(said)


def section(values: dict[str, Any], folder: Path, quick: bool) -> Section:
    """Figure 7."""
    figure, axes = canvas(3.9, 1, 2)
    layers = range(len(values["raw"]["gap"]))
    for name in VARIANTS:
        style = {"color": COLOURS[name], "marker": MARKERS[name], "label": LABELS[name], "markersize": 4}
        axes[0, 0].plot(layers, values[name]["gap"], **style)
        shown = values[name]["sorted"]
        axes[0, 1].plot(range(1, len(shown) + 1), shown, **style)
    axes[0, 0].set_xlabel("layer")
    axes[0, 0].set_ylabel("busiest − least busy, even shares")
    axes[0, 0].set_title("Gap of each layer")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].legend()
    axes[0, 1].axhline(1, color="black", linewidth=1, linestyle=":")
    axes[0, 1].set_xlabel("slot, from the busiest")
    axes[0, 1].set_ylabel("load, even shares of the original")
    axes[0, 1].set_title("Sorted loads, mean over layers")
    axes[0, 1].set_ylim(bottom=0)
    path = save(figure, folder / "gaps.png")
    rows = [
        (
            LABELS[name],
            *(f"{np.mean(values[name][what]):.3f}" for what in ("busiest", "least", "gap", "step")),
            f"{np.max(values[name]['gap']):.3f}",
        )
        for name in VARIANTS
    ]
    tasks = [
        (prompts.TITLES[task], *(f"{values[name]['tasks'][task]:.3f}" for name in VARIANTS))
        for task in values["raw"]["tasks"]
    ]
    columns = ("", "busiest", "least busy", "gap", "busiest − second", "widest gap of a layer")
    text = (
        f"{verdict(values)}\n\n{picture(path, 'Activation gap of each layer, and sorted loads')}\n\n"
        "Loads of a layer's slots in multiples of an even share, `E * load / sum of the layer`; the gap is the busiest "
        "less the least busy, mean over layers and tasks, on prompts that calibration has not seen. The paper's own "
        f"definition may differ in scale.\n\n{table(columns, rows)}\n\nGap by task:\n\n"
        f"{table(('task', *(LABELS[n] for n in VARIANTS)), tasks)}\n"
    )
    return Section("Figure 7: activation gaps", text)
