"""Figure 8: streams, replicas decided again at each step.

    adversarial   the paper's stream: MMLU prompts that hit the heavy hitters most, ten time steps
    tasks         all tasks' prompts, one task after another, `WINDOWS` windows each

    raw, static, option 1 (long: all steps so far), option 2 (short: the last step), adaptive, oracle

as `equipoise.streaming` has them, from recorded counts. R spare slots a layer: 1, the paper's, and E/4. The first
step places and is not scored. `moved` is how many slots change their expert over the stream.
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

from equipoise.streaming import POLICIES, Replay, adversarial_stream, choose_adversarial, replay
from equipoise.types import FloatArray, IntArray

WINDOWS = 10
PARTS = 8
TITLES = {"adversarial": "adversarial MMLU", "tasks": "one task after another"}


def task_stream(routing: Mapping[str, IntArray], windows: int = WINDOWS, parts: int = PARTS) -> FloatArray:
    """[N, P, L, E]: each task's prompts [prompts, L, E] in `windows` windows of `parts` parts, in order."""
    parts = min(parts, *(len(counts) // windows for counts in routing.values()))
    return np.stack(
        [
            np.stack([part.sum(0) for part in np.array_split(window, parts)])
            for counts in routing.values()
            for window in np.array_split(np.asarray(counts, dtype=np.float64), windows)
        ]
    )


def followed(parts: FloatArray, spare: int) -> dict[str, Any]:
    """Replay: LIS of each step, its mean, and slots moved, by policy."""
    result = Replay(POLICIES)
    result.steps.extend(replay(parts, spare))
    steps = {name: [step.lis[name] for step in result.steps] for name in POLICIES}
    return {"spare": spare, "lis": result.lis(), "moves": result.moves(), "steps": steps}


def measure_counts(routing: Mapping[str, IntArray], keep: float) -> dict[str, Any]:
    """Both streams and both numbers of spare slots; routing: task -> int64 [prompts, L, E]."""
    mmlu = routing["mmlu"]
    chosen = choose_adversarial(mmlu, keep)
    streams = {"adversarial": adversarial_stream(mmlu, chosen).parts, "tasks": task_stream(routing)}
    spares = sorted({1, max(1, mmlu.shape[2] // 4)})
    return {
        "streams": {name: [followed(parts, spare) for spare in spares] for name, parts in streams.items()},
        "documents": len(chosen.kept), "of": len(mmlu), "hit": float(chosen.hit[chosen.kept].mean()),
        "hit_all": float(chosen.hit.mean()), "tasks": list(routing), "windows": WINDOWS,
    }  # fmt: skip


def measure(subject: Subject) -> dict[str, Any]:
    """From recorded counts."""
    # A tenth of the few prompts of the small form would be fewer than one a step.
    return measure_counts({task: subject.routing(task) for task in prompts.TASKS}, 0.5 if subject.quick else 0.1)


def verdict(values: dict[str, Any]) -> str:
    """What the figures say, at the larger number of spare slots."""
    said = []
    for name, runs in values["streams"].items():
        lis, moves = runs[-1]["lis"], runs[-1]["moves"]
        ranked = sorted(("static", "long", "short", "adaptive"), key=lambda policy: lis[policy])
        said.append(f"{capital(TITLES[name])} (R = {runs[-1]['spare']}): raw {lis['raw']:.3f}, "
                    f"oracle {lis['oracle']:.3f}; from the best, "
                    + ", ".join(f"{LABELS[p]} {lis[p]:.3f}" for p in ranked)
                    + f". Option 2 moves {moves['short']} slots, adaptive {moves['adaptive']}.")  # fmt: skip
        if lis[ranked[-1]] < 1.02 * lis[ranked[0]]:
            said.append("The four are within 2 % of each other: there is little to follow in this stream.")
        elif lis["static"] > 1.02 * lis[ranked[0]]:
            said.append(
                f"A plan made once is {lis['static'] / lis[ranked[0]] - 1:.0%} worse than the best that follows."
            )
    return " ".join(said)


def section(values: dict[str, Any], folder: Path, quick: bool) -> Section:
    """Figure 8."""
    figure, axes = canvas(6.6, 2, 1)
    for axis, (name, runs) in zip(axes[:, 0], values["streams"].items(), strict=True):
        steps = runs[-1]["steps"]
        x = np.arange(1, len(steps["raw"]) + 1)
        for policy in POLICIES:
            axis.plot(x, steps[policy], color=COLOURS[policy], marker=MARKERS[policy], markersize=3.5, linewidth=1.3,
                      linestyle="--" if policy in ("raw", "oracle") else "-", label=LABELS[policy])  # fmt: skip
        axis.set_title(f"{capital(TITLES[name])}, {runs[-1]['spare']} spare slots a layer")
        axis.set_ylabel("LIS, mean over layers")
        axis.set_xlabel("time step")
        if name == "tasks":
            top = axis.get_ylim()[1]
            for i, task in enumerate(values["tasks"]):
                if i:
                    axis.axvline(i * values["windows"] - 0.5, color="black", linewidth=0.7, alpha=0.4)
                axis.text(max(1, i * values["windows"]) - 0.3, top, prompts.TITLES[task], fontsize=8, va="bottom")
            axis.set_title(axis.get_title(), pad=16)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6, fontsize=8)
    path = save(figure, folder / "streams.png")
    rows = [
        (
            TITLES[name], run["spare"], *(f"{run['lis'][p]:.3f}" for p in POLICIES),
            *(run["moves"][p] for p in ("long", "short", "adaptive")),
        )
        for name, runs in values["streams"].items()
        for run in runs
    ]  # fmt: skip
    columns = ("stream", "spare a layer", *(LABELS[p] for p in POLICIES), "moved, long", "moved, short", "adaptive")
    text = (
        f"{verdict(values)}\n\n{picture(path, 'LIS of each time step, by policy')}\n\n"
        f"Adversarial: {values['documents']} of {values['of']} MMLU prompts, those that give the heavy hitters most "
        f"({values['hit']:.0%} of their selections; all prompts {values['hit_all']:.0%}), in ten steps. Tasks: "
        f"{values['windows']} windows of each. Mean LIS over the steps; the first step places and is not scored.\n\n"
        f"{table(columns, rows)}\n"
    )
    return Section("Figure 8: streams", text)
