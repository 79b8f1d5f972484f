"""Held-out LIS on in-domain text: a domain's own calibration text plans, its held-out documents score.

The seven domains and their hold-out are those of benchmarks/reference_moe/data.py. Four plans for each domain, all
`joint` at budget 1.0: from the domain's own text, at the defaults and with the budget filled (`--slot-weight 0`:
replicas are added for as long as they help at all); from the text of all domains pooled; from the tasks' prompts (the
plan of Table 2), which is of another kind than all of them. Importance is that of Table 2's profile. Loads are exact
counts of the model on both parts; the router is untouched, so a plan's load follows from its shares.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import prompts
from accuracy import neighbour
from drawing import save
from sections import Section, picture, table
from subject import WINDOW, Subject

import equipoise as eq
from equipoise.scoring import score_counts
from equipoise.types import IntArray, Profile

BAR = 1.10
OWN, FILLED = "own domain", "own, filled"
PLANS = (OWN, FILLED, "all domains", "tasks")


def counted(subject: Subject) -> dict[str, Any]:
    """`<domain>.train`, `<domain>.held` int64 [windows, L, E]: selections of each window."""
    data = neighbour("reference_moe", "data")
    model = subject.model("original").model
    out = {}
    for domain in data.DOMAINS:
        for held in (False, True):
            tokens = data.tokenized(subject.data, subject.tokenizer, domain, held)
            rows = data.held_out_windows(tokens, WINDOW, subject.sizes.windows)
            out[f"{domain}.{'held' if held else 'train'}"] = prompts.routing(model, rows.tolist(), subject.rows(8))
    return out


def with_counts(profile: Profile, series: IntArray) -> Profile:
    """The profile with other loads: `series` int64 [windows, L, E]."""
    return dataclasses.replace(profile, counts=series.sum(0), series=series)


def measure(subject: Subject) -> dict[str, Any]:
    """By domain: LIS raw, under each plan, oracle, of the held-out text's counts; and slots and bytes of the plans."""
    loads = subject.store.arrays(
        "domains/routing", subject.inputs(windows=subject.sizes.windows), lambda: counted(subject), [prompts]
    )
    domains = [name.removesuffix(".held") for name in loads if name.endswith(".held")]
    everything = np.concatenate([loads[f"{domain}.train"] for domain in domains])
    pooled = eq.plan(with_counts(subject.profile, everything), budget=1.0)
    rows = {}
    for domain in domains:
        seen = with_counts(subject.profile, loads[f"{domain}.train"])
        own, filled = (eq.plan(seen, budget=1.0, **more) for more in ({}, {"slot_weight": 0.0}))
        held = loads[f"{domain}.held"]
        row: dict[str, Any] = {}
        for name, plan in zip(PLANS, (own, filled, pooled, subject.plans["joint"]), strict=True):
            means = score_counts(plan, held.sum(0)[None]).means()
            row["raw"] = means["lis_raw"]
            row[name] = means["lis"]
            row[f"{name}, oracle"] = means["lis_oracle"]
            row[f"{name}, replicas"] = plan.num_replicas
            row[f"{name}, bytes"] = plan.budget.plan_bytes / plan.budget.original_bytes
        row["tokens"] = [
            int(loads[f"{domain}.{part}"][:, 0].sum()) // subject.profile.top_k for part in ("train", "held")
        ]
        rows[domain] = row
    return rows


def section(values: dict[str, Any], folder: Path, quick: bool) -> Section:
    """A table by domain, a picture, and whether the plan of the own domain stays at or below 1.10."""
    columns = ("raw", *PLANS, f"{FILLED}, oracle")
    rows = [
        [
            domain,
            *row["tokens"],
            *(f"{row[c]:.2f}" for c in columns),
            row[f"{OWN}, replicas"],
            row[f"{FILLED}, replicas"],
        ]
        for domain, row in values.items()
    ]
    mean = {c: float(np.mean([row[c] for row in values.values()])) for c in columns}
    rows.append(["**mean**", "", "", *(f"**{mean[c]:.2f}**" for c in columns), "", ""])
    size = max(row[f"{name}, bytes"] for row in values.values() for name in PLANS)
    words = " ".join(
        [
            "Planned on its own domain,",
            *(f"{words} LIS is {mean[name]:.2f} on average and {worst(values, name):.2f} at worst (bar {BAR:.2f}: "
              f"{'met' if worst(values, name) <= BAR else 'missed'});"
              for name, words in ((OWN, "at the defaults held-out"), (FILLED, "with the budget filled"))),
            f"one plan for all domains reaches {mean['all domains']:.2f}, the tasks' plan {mean['tasks']:.2f}. Every "
            f"plan is at {size:.3f} of the original bytes or below.",
        ]
    )  # fmt: skip
    draw(values, folder / "domains.png")
    heads = ["domain", "tokens, planned on", "scored", *columns, "replicas, defaults", "filled"]
    drawn = picture(folder / "domains.png", "held-out LIS by domain and plan")
    return Section("In-domain text: held-out LIS", f"{words}\n\n{table(heads, rows)}\n\n{drawn}")


def worst(values: dict[str, Any], plan: str) -> float:
    """Held-out LIS of a plan in the domain where it is highest."""
    return max(float(row[plan]) for row in values.values())


def draw(values: dict[str, Any], path: Path) -> None:
    """Bars by domain."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    at = np.arange(len(values))
    colours = {"raw": "#9aa5b1", OWN: "#33658a", FILLED: "#2a9d5c", "all domains": "#8fb8de", "tasks": "#e9a23b"}
    for i, (name, colour) in enumerate(colours.items()):
        axes.bar(at + (i - 2) * 0.17, [row[name] for row in values.values()], 0.16, label=name, color=colour)
    axes.axhline(BAR, color="#d1495b", linewidth=1, linestyle="--", label=f"bar, {BAR:.2f}")
    axes.set_xticks(at, list(values))
    axes.set_ylabel("held-out LIS, mean over layers")
    axes.margins(y=0.14)
    axes.legend(ncols=6, frameon=False, fontsize=9)
    save(figure, path)
