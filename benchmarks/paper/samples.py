"""Finding (iii): how many calibration prompts does a plan need, and does it serve other texts?

Each task's prompts are shuffled and halved; one half is scored, plans are made from 1, 2, 5, 10 and 50 % of the
prompts, all out of the other half and each within the next larger. So every plan of a seed is scored on the same text.

    raw, oracle   of the scored half: the model as it is; as many replicas as `joint` has, placed by that half itself
    found         share of layers whose heavy hitter of the sample is that of the scored half
    across        plans from the calibration tenth of one task (or of all, `all tasks`), scored on the rest of each

Counts only: `counted`. LIS of all scored prompts together, mean over layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import prompts
from counted import counted_plans, counted_profile, lis_of
from drawing import COLOURS, LABELS, MARKERS, canvas, capital, save
from sections import Section, picture, table
from subject import Subject

from equipoise.types import IntArray, Profile

FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.5)
SEEDS = 5
NAMES = ("raw", "paper", "joint", "oracle", "found")


def scores(plan_on: IntArray, score_on: IntArray, template: Profile) -> dict[str, float]:
    """`NAMES` of plans made on some prompts [P, L, E] and scored on others."""
    plans = counted_plans(counted_profile(plan_on, template))
    joint = lis_of(plans["joint"], score_on)
    found = plan_on.sum(0).argmax(-1) == score_on.sum(0).argmax(-1)
    return {
        "raw": joint["raw"], "paper": lis_of(plans["paper"], score_on)["planned"], "joint": joint["planned"],
        "oracle": joint["oracle"], "found": float(found.mean()),
    }  # fmt: skip


def subsets(counts: IntArray, template: Profile, seed: int) -> dict[str, dict[str, float]]:
    """Fraction -> scores, one task and seed."""
    order = np.random.default_rng(seed).permutation(len(counts))
    half = len(counts) // 2
    out = {}
    for fraction in FRACTIONS:
        number = min(half, max(1, round(fraction * len(counts))))
        out[str(fraction)] = {**scores(counts[order[:number]], counts[order[half:]], template), "prompts": number}
    return out


def across(routing: Mapping[str, IntArray], template: Profile) -> dict[str, Any]:
    """LIS of plans from each task, and from all together, on the rest of each task."""
    first = {task: counts[: prompts.calibration(len(counts))] for task, counts in routing.items()}
    rest = {task: counts[prompts.calibration(len(counts)) :] for task, counts in routing.items()}
    sources = {**first, "all tasks": np.concatenate(list(first.values()))}
    out: dict[str, Any] = {"from": list(sources), "on": list(rest), "raw": [], "oracle": [], "paper": [], "joint": []}
    made = {name: counted_plans(counted_profile(counts, template)) for name, counts in sources.items()}
    for preset in ("paper", "joint"):
        out[preset] = [[lis_of(made[a][preset], rest[b])["planned"] for b in rest] for a in sources]
    for task, counts in rest.items():
        found = lis_of(made[task]["joint"], counts)
        out["raw"].append(found["raw"])
        out["oracle"].append(found["oracle"])
    return out


def measure(subject: Subject) -> dict[str, Any]:
    """All tasks, fractions and seeds."""
    routing = {task: subject.routing(task) for task in prompts.TASKS}
    seeds = range(2 if subject.quick else SEEDS)
    return {
        "fractions": {
            task: [subsets(counts, subject.profile, seed) for seed in seeds] for task, counts in routing.items()
        },
        "across": across(routing, subject.profile),
    }


def over_tasks(values: dict[str, Any], fraction: float, name: str) -> np.ndarray:
    """A figure's mean over tasks, one for each seed."""
    runs = values["fractions"].values()
    return np.mean([[run[str(fraction)][name] for run in task] for task in runs], axis=0)


def gained(before: float, after: float, best: float) -> float:
    """Share of the way from `before` to `best`."""
    return (before - after) / (before - best) if before != best else float("nan")


def verdict(values: dict[str, Any]) -> str:
    """What the figures say about finding (iii)."""
    said = []
    for preset in ("paper", "joint"):
        means = [float(over_tasks(values, f, preset).mean()) for f in FRACTIONS]
        raw, tenth = float(over_tasks(values, 0.1, "raw").mean()), FRACTIONS.index(0.1)
        whole = raw - means[-1]
        part = (raw - means[tenth]) / whole if whole > 0 else 0.0
        said.append(
            f"{capital(LABELS[preset])}: LIS {raw:.3f} becomes {means[0]:.3f} with 1 % of the prompts, "
            f"{means[tenth]:.3f} with 10 % and {means[-1]:.3f} with 50 %"
            + (f": a tenth of the prompts gives {part:.0%} of what half of them give." if whole > 0 else ".")
        )
    near = {p: over_tasks(values, 0.1, p).mean() / over_tasks(values, 0.5, p).mean() for p in ("paper", "joint")}
    enough = [LABELS[preset] for preset, ratio in near.items() if ratio <= 1.02]
    said.append("The paper's finding (iii), that a small calibration set is enough, "
                + (f"holds here within a task for {' and '.join(enough)}: a tenth comes within 2 % of the LIS of half."
                   if enough else "does not hold here: no tenth comes within 2 % of the LIS of half."))  # fmt: skip
    table_, tasks = values["across"], len(values["across"]["on"])
    joint = np.array(table_["joint"])
    own, others = float(np.diag(joint[:tasks]).mean()), float(joint[:tasks][~np.eye(tasks, dtype=bool)].mean())
    raw, oracle, mixed = (float(np.mean(x)) for x in (table_["raw"], table_["oracle"], joint[-1]))
    said.append(f"Across tasks, a joint plan made on one task and scored on another has LIS {others:.3f} (own task "
                f"{own:.3f}, all tasks together {mixed:.3f}, raw {raw:.3f}, oracle {oracle:.3f}): "
                + (f"it keeps {gained(raw, others, oracle):.0%} of the possible gain instead of "
                   f"{gained(raw, own, oracle):.0%}"
                   if others > 1.01 * own else "it does as well as on its own task")
                + (", and a calibration set of all tasks makes up for most of it."
                   if others > 1.01 * own and mixed - own < 0.5 * (others - own) else "."))  # fmt: skip
    return " ".join(said)


def section(values: dict[str, Any], folder: Path, quick: bool) -> Section:
    """Size of the calibration set, and plans across tasks."""
    figure, axes = canvas(4.2, 1, 2, width_ratios=(1, 1.15))
    percent = [100 * f for f in FRACTIONS]
    axis = axes[0, 0]
    for name in ("raw", "paper", "joint", "oracle"):
        runs = np.array([over_tasks(values, f, name) for f in FRACTIONS])
        spread = runs.std(1, ddof=1) if runs.shape[1] > 1 else np.zeros(len(runs))
        axis.errorbar(percent, runs.mean(1), spread, color=COLOURS[name], marker=MARKERS[name], capsize=3,
                      linestyle="--" if name in ("raw", "oracle") else "-", label=LABELS[name])  # fmt: skip
    axis.set_xscale("log")
    axis.set_xticks(percent, [f"{p:g}" for p in percent])
    axis.minorticks_off()
    axis.set_xlabel("prompts planned on, % of a task's")
    axis.set_ylabel("LIS on the other half, mean over tasks")
    axis.set_title("Size of the calibration set")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.25 * (high - low))  # room for the legend above the lines
    axis.legend(ncols=2, fontsize=8, loc="upper center")
    draw_across(figure, axes[0, 1], values["across"])
    path = save(figure, folder / "samples.png")
    rows = []
    for task, runs in values["fractions"].items():
        row: list[str] = [prompts.TITLES[task], f"{np.mean([r['0.1']['raw'] for r in runs]):.3f}"]
        for preset in ("paper", "joint"):
            row += [
                f"{np.mean(x):.3f} ± {np.std(x, ddof=1) if len(x) > 1 else 0:.3f}"
                for x in ([r[str(f)][preset] for r in runs] for f in (0.01, 0.1, 0.5))
            ]
        rows.append([*row, f"{np.mean([r['0.5']['oracle'] for r in runs]):.3f}"])
    found = [(f"{100 * f:g} %", f"{over_tasks(values, f, 'found').mean():.0%}") for f in FRACTIONS]
    columns = ("task", "raw", "R&Q 1 %", "R&Q 10 %", "R&Q 50 %", "joint 1 %", "joint 10 %", "joint 50 %", "oracle")
    seeds = len(next(iter(values["fractions"].values())))
    text = (
        f"{verdict(values)}\n\n{picture(path, 'LIS against the calibration set, and plans across tasks')}\n\n"
        f"Mean ± standard deviation over {seeds} random subsets; planned from counts alone, scored on the half of a "
        f"task's prompts that no plan saw. Oracle: as many replicas a layer as joint has from 50 %.\n\n"
        f"{table(columns, rows)}\n\n"
        "Layers whose heavy hitter in the sample is that of the scored half, mean over tasks:\n\n"
        f"{table(('prompts planned on', *(f[0] for f in found)), [('heavy hitter found', *(f[1] for f in found))])}\n"
    )
    return Section("Size of the calibration set (finding iii)", text)


def draw_across(figure: Any, axis: Any, values: dict[str, Any]) -> None:
    """Heat map of joint plans: from a task (rows) on a task (columns)."""
    shown = np.array(values["joint"])
    axis.grid(False)
    image = axis.imshow(shown, cmap="cividis_r", aspect="auto")
    names = [prompts.TITLES.get(name, name) for name in values["from"]]
    axis.set_yticks(range(len(names)), names, fontsize=8)
    on = [prompts.TITLES[name] for name in values["on"]]
    axis.set_xticks(range(len(on)), on, rotation=40, ha="right", fontsize=8)
    middle = (shown.min() + shown.max()) / 2
    for (i, j), value in np.ndenumerate(shown):
        axis.text(
            j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if value > middle else "black"
        )
    axis.set_ylabel("joint plan made on")
    axis.set_xlabel("scored on the rest of")
    axis.set_title("Plans across tasks: LIS")
    figure.colorbar(image, ax=axis, shrink=0.8)
