"""Table 3: which part of R&Q does what. Strategies of the paper's ablation, and joint.

    quantize-only    the least important expert of a layer lowered, nothing replicated
    random           replicated and lowered experts drawn at random (LIS: mean of several draws)
    quantize-heavy   the heavy hitter lowered instead, and replicated
    quantize-all     every expert lowered, nothing replicated
    rq               the method
    joint            replicas and precision together at budget 1.0

LIS from recorded counts on the prompts that calibration has not seen, a task at a time, by the slots' shares. Bytes
of the plan's routed experts, relative to the original's. Perplexity with the plan applied to the model, on windows of
those prompts; the change is paired by window, 95 %.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import prompts
from counted import lis_of
from drawing import COLOURS, canvas, save
from sections import Section, interval, picture, table
from subject import Subject

import equipoise as eq
from equipoise.evaluation.perplexity import evaluate_text, paired_difference
from equipoise.types import IntArray, Plan, Profile

STRATEGIES = ("quantize-only", "random", "quantize-heavy", "quantize-all", "rq")
DRAWS = 5
TITLES = {
    "original": "original", "quantize-only": "quantize only", "random": "random experts",
    "quantize-heavy": "quantize the heavy hitter", "quantize-all": "quantize all", "rq": "R&Q", "joint": "joint",
}  # fmt: skip


def plans(profile: Profile) -> dict[str, list[Plan]]:
    """Plans by strategy; several draws of `random`."""
    out = {
        name: [
            eq.plan(profile, preset="paper", strategy=name, seed=seed)
            for seed in range(DRAWS if name == "random" else 1)
        ]
        for name in STRATEGIES
    }
    return {**out, "joint": [eq.plan(profile, budget=1.0)]}


def balance(made: list[Plan], rest: dict[str, IntArray]) -> dict[str, Any]:
    """LIS by task (mean over draws), bytes, replicas and lowered experts a layer."""
    lis = {task: float(np.mean([lis_of(p, counts)["planned"] for p in made])) for task, counts in rest.items()}
    layers = len(made[0].layers)
    return {
        "lis": lis, "bytes": made[0].budget.plan_bytes / made[0].budget.original_bytes,
        "replicas": made[0].num_replicas / layers, "quantized": made[0].num_quantized / layers,
    }  # fmt: skip


def measure(subject: Subject) -> dict[str, Any]:
    """Plan, score, apply, read."""
    rest = {task: subject.rest(task) for task in prompts.TASKS}
    made, windows = plans(subject.profile), subject.windows("rest")
    before = evaluate_text(subject.model("original").model, windows)
    raw = {task: float(eq.lis(counts.sum(0)).mean()) for task, counts in rest.items()}
    out: dict[str, Any] = {
        "original": {"lis": raw, "bytes": 1.0, "replicas": 0.0, "quantized": 0.0, "perplexity": before.perplexity}
    }
    for name, drawn in made.items():
        model = subject.copied()
        subject.apply(model, drawn[0])
        after = evaluate_text(model, windows)
        del model
        gc.collect()
        change, (low, high) = paired_difference(before, after)
        out[name] = {**balance(drawn, rest), "perplexity": after.perplexity, "change": [change, low, high]}
    return {"rows": out, "windows": len(before.tokens), "tokens": int(before.tokens.sum()), "draws": DRAWS}


def lis(values: dict[str, Any], name: str) -> float:
    """Mean over tasks."""
    return float(np.mean(list(values["rows"][name]["lis"].values())))


def verdict(values: dict[str, Any]) -> str:
    """What the figures say."""
    raw, rows = lis(values, "original"), values["rows"]
    by = {name: raw / lis(values, name) for name in rows}
    best = max(by, key=lambda name: by[name])
    said = [f"Least imbalance: {TITLES[best]}, {by[best]:.2f}x less than the original; R&Q {by['rq']:.2f}x, random "
            f"experts {by['random']:.2f}x."]  # fmt: skip
    alike = [name for name in ("quantize-only", "quantize-all") if abs(by[name] - 1) < 0.005]
    if len(alike) == 2:
        said.append("Lower precision alone moves no load: the figures of `quantize only` and `quantize all` are the "
                    "original's. Replicas of the heavy hitter are what balances.")  # fmt: skip
    if abs(by["quantize-heavy"] - by["rq"]) < 0.005:
        said.append("Which expert is lowered makes no difference to balance either (quantize the heavy hitter and R&Q "
                    "have the same replicas).")  # fmt: skip
    sure = [name for name in rows if name != "original" and rows[name]["change"][1] > 0]
    better = [name for name in rows if name != "original" and rows[name]["change"][2] < 0]
    changes = [abs(rows[name]["change"][0]) for name in rows if name != "original"]
    widest = max((row["change"][2] - row["change"][1]) / 2 for row in rows.values() if "change" in row)
    said.append(f"Perplexity changes by at most {max(changes):.2f} % (the widest interval: ± {widest:.2f} %); "
                + (f"it is worse beyond chance for {', '.join(TITLES[n] for n in sure)}" if sure
                   else "for no strategy is it worse beyond chance")
                + (f", better beyond chance for {', '.join(TITLES[n] for n in better)}." if better
                   else "."))  # fmt: skip
    return " ".join(said)


def section(values: dict[str, Any], folder: Path, quick: bool) -> Section:
    """Table 3."""
    rows = values["rows"]
    figure, axes = canvas(3.6, 1, 2, sharey=True)
    names = list(rows)[::-1]
    colours = [COLOURS[{"rq": "paper", "joint": "joint", "original": "original"}.get(n, "static")] for n in names]
    axes[0, 0].barh(range(len(names)), [lis(values, n) for n in names], color=colours)
    axes[0, 0].axvline(1, color="black", linewidth=1, linestyle=":")
    axes[0, 0].set_yticks(range(len(names)), [TITLES[n] for n in names])
    axes[0, 0].set_xlabel("LIS, mean over layers and tasks (1 is even)")
    axes[0, 0].set_title("Balance, held-out prompts")
    for i, name in enumerate(names):
        change, low, high = rows[name].get("change", (0.0, 0.0, 0.0))
        axes[0, 1].errorbar(change, i, xerr=[[change - low], [high - change]], color=colours[i], marker="o", capsize=4)
    axes[0, 1].axvline(0, color="black", linewidth=1, linestyle=":")
    axes[0, 1].set_xlabel("change of perplexity, % (95 %, paired)")
    axes[0, 1].set_title("Quality, held-out windows")
    path = save(figure, folder / "ablation.png")
    lines = [
        (
            TITLES[name], f"{lis(values, name):.3f}", f"{lis(values, 'original') / lis(values, name):.2f}x",
            f"{row['bytes']:.4f}", f"{row['replicas']:.1f}", f"{row['quantized']:.1f}", f"{row['perplexity']:.3f}",
            interval(*row["change"], 3) if "change" in row else "",
        )
        for name, row in rows.items()
    ]  # fmt: skip
    tasks = list(rows["original"]["lis"])
    by_task = [(TITLES[name], *(f"{row['lis'][task]:.3f}" for task in tasks)) for name, row in rows.items()]
    columns = ("strategy", "LIS", "less by", "bytes", "replicas a layer", "lowered a layer", "perplexity", "change, %")
    text = (
        f"{verdict(values)}\n\n{picture(path, 'Imbalance and perplexity of each strategy')}\n\n"
        f"{table(columns, lines)}\n\nPerplexity on {values['windows']} windows, {values['tokens']:,} scored tokens. "
        f"`random experts`: LIS is the mean of {values['draws']} draws, perplexity the first draw's. `lowered`: "
        "experts no slot of which keeps the original precision. LIS by task:\n\n"
        f"{table(('strategy', *(prompts.TITLES[task] for task in tasks)), by_task)}\n"
    )
    return Section("Table 3: ablation", text)
