"""Every number behind the pictures, as tables of text: what a person copies is what a person sees.

Numbers are written plainly (`12345`, `0.8125`, `-0.034`), without thousands separators or units, so that a
pasted table is numbers to a spreadsheet; the unit stands in the column's head. Shares are percent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from equipoise.reporting.figures import MIB, Figures
from equipoise.reporting.gate_metrics import Gate
from equipoise.reporting.metrics_file import Metrics
from equipoise.reporting.run_directory import Run
from equipoise.types import PRECISIONS, FloatArray, IntArray, LayerPlan


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        key: its id in the page.
        title: what a person opens.
        columns: heads with units.
        rows: cells as text.
        words: columns that hold words, not numbers.
        foot: rows that sum up.
    """

    key: str
    title: str
    columns: list[str]
    rows: list[list[str]]
    words: frozenset[int] = frozenset()
    foot: tuple[list[str], ...] = ()


def number(value: float | None, form: str = ".4f") -> str:
    """Four decimals, so that a column lines up; nothing where there is no number."""
    if value is None or math.isnan(value):
        return ""
    text = format(value, form)
    return text if float(text) else text.lstrip("-")


def _percent(part: float, whole: float) -> str:
    return number(100 * part / whole) if whole else ""


def lis_table(figures: Figures, metrics: Metrics) -> Table:
    """LIS of each layer: held out and in sample, before and after."""
    series = (figures.lis_before, figures.lis_after, figures.lis_before_in_sample, figures.lis_after_in_sample)
    summary = metrics.summary
    batch = ["mean over batches and layers", number(summary.lis_before_batch), number(summary.lis_after_batch)]
    return Table(
        "t-lis",
        "LIS of each layer",
        [
            "layer",
            "LIS before (held out)",
            "LIS after (held out)",
            "LIS before (in sample)",
            "LIS after (in sample)",
        ],
        [[label, *map(number, row)] for label, row in zip(figures.labels, np.stack(series, 1), strict=True)],
        frozenset({0}),
        (["mean over layers", *(number(float(s.mean())) for s in series)], [*batch, "", ""]),
    )


def plan_table(run: Run, figures: Figures) -> Table:
    """What the plan does to each layer and what that costs and brings."""
    columns = ["layer", "module", "slots", "replicas", "most slots of an expert", "experts quantized"]
    columns += [f"{name} slots" for name in PRECISIONS]
    columns += ["before (MiB)", "after (MiB)", "selections on quantized slots (%)", "slot imbalance (held out)"]
    columns += ["rank imbalance (held out)"] * (figures.rank_imbalance is not None)
    rows = []
    for row, (planned, measured) in enumerate(zip(run.plan.layers, run.metrics.layers, strict=True)):
        held: list[str] = [slot.precision for slot in planned.slots]
        cells = [figures.labels[row], planned.name or "-", str(len(held)), str(measured.replicas)]
        cells += [str(int(figures.replicas[row].max())), str(measured.quantized)]
        cells += [str(held.count(name)) for name in PRECISIONS]
        cells += [number(measured.bytes_before / MIB), number(measured.bytes_after / MIB)]
        cells += [number(100 * measured.tokens_quantized), number(float(figures.slot_imbalance[row]))]
        if figures.rank_imbalance is not None:
            cells.append(number(float(figures.rank_imbalance[row])))
        rows.append(cells)
    summary = run.metrics.summary
    totals = ["all", "", str(sum(len(layer.slots) for layer in run.plan.layers)), str(summary.replicas)]
    totals += [str(int(figures.replicas.max())), str(summary.quantized)]
    totals += [str(sum(s.precision == name for p in run.plan.layers for s in p.slots)) for name in PRECISIONS]
    totals += [number(summary.bytes_before / MIB), number(summary.bytes_after / MIB)]
    totals += [number(100 * summary.tokens_quantized), ""]
    means = ["mean", *[""] * (len(totals) - 2), number(float(figures.slot_imbalance.mean()))]
    if figures.rank_imbalance is not None:
        totals.append("")
        means.append(number(float(figures.rank_imbalance.mean())))
    return Table("t-plan", "The plan, layer by layer", columns, rows, frozenset({0, 1}), (totals, means))


def expert_table(run: Run, figures: Figures) -> Table:
    """Every expert of every layer: the numbers of the heat map, the activation gap and the scatter."""
    names = list(figures.importance)
    columns = ["layer", "expert", "selections before", "before / mean", "rank before", "gap to next before (%)"]
    columns += ["busiest slot's tokens after", "after / mean", "rank after", "gap to next after (%)"]
    columns += ["slots", "precisions", "selections in calibration"]
    columns += [f"{name} importance" for name in names]
    rank_before, rank_after = _ranks(figures.counts), _ranks(figures.busiest)
    rows = []
    layers, experts = figures.shape
    for row in range(layers):
        held = _precisions(run.plan.layers[row])
        for e in range(experts):
            cells = [figures.labels[row], str(e)]
            for load, relative, ranks, gaps in (
                (figures.counts, figures.before, rank_before, figures.gap_before),
                (figures.busiest, figures.after, rank_after, figures.gap_after),
            ):
                rank = int(ranks[row, e])
                gap = "" if rank == experts else number(100 * float(gaps[row, rank - 1]), ".5f")
                cells += [str(int(load[row, e])), number(float(relative[row, e])), str(rank), gap]
            cells += [str(int(figures.replicas[row, e])), held[e]]
            cells.append(str(int(figures.calibration[row, e])))
            cells += [number(float(figures.importance[name][row, e]), ".6g") for name in names]
            rows.append(cells)
    return Table("t-experts", "Every expert of every layer", columns, rows, frozenset({0, 11}))


def _ranks(load: IntArray) -> IntArray:
    """[L, E] rank of each expert in its layer, 1 = busiest; equal loads in the experts' order."""
    order = np.argsort(-load, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(1, load.shape[1] + 1)[None, :], axis=1)
    return ranks


def _precisions(layer: LayerPlan) -> list[str]:
    """[E] what the slots of each expert are held in: `original`, `2 int8`, `original + int8`."""
    held: list[dict[str, int]] = [{} for _ in range(layer.num_experts)]
    for slot in layer.slots:
        held[slot.expert][slot.precision] = held[slot.expert].get(slot.precision, 0) + 1
    return [" + ".join(f"{n} {name}" if n > 1 else name for name, n in one.items()) for one in held]


def correlation_table(figures: Figures) -> Table:
    """Spearman's rho of load and each importance, of each layer, on the calibration text."""
    names = list(figures.rho)
    rows = [
        [label, *(number(float(figures.rho[name][row])) or "constant" for name in names)]
        for row, label in enumerate(figures.labels)
    ]
    medians = [number(_median(figures.rho[name])) or "constant" for name in names]
    return Table(
        "t-rho",
        "Rank correlation of load and importance (Spearman's ρ, calibration text)",
        ["layer", *(f"ρ of load and {name}" for name in names)],
        rows,
        frozenset({0}),
        (["median over layers", *medians],),
    )


def _median(values: FloatArray) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else math.nan


def bytes_table(run: Run) -> Table:
    """Bytes of the routed experts by precision."""
    before, after = run.metrics.bytes_before, run.metrics.bytes_after
    totals = run.metrics.summary.bytes_before, run.metrics.summary.bytes_after

    def cells(name: str, old: int, new: int) -> list[str]:
        return [name, str(old), number(old / MIB), str(new), number(new / MIB), _percent(new, totals[1])]

    limit = run.plan.budget.limit_bytes
    return Table(
        "t-bytes",
        "Bytes by precision",
        ["precision", "before (bytes)", "before (MiB)", "after (bytes)", "after (MiB)", "share after (%)"],
        [
            cells(name, before.get(name, 0), after.get(name, 0))  # type: ignore[call-overload]
            for name in PRECISIONS
            if name in before or name in after
        ],
        frozenset({0}),
        (cells("all", *totals), ["allowed by the budget", "", "", str(limit), number(limit / MIB), ""]),
    )


def perplexity_table(metrics: Metrics) -> Table:
    """Perplexity of each domain, before and after, with the paired interval of the change."""
    rows = []
    for entry in sorted(metrics.perplexity, key=lambda entry: entry.domain == "all"):
        low, high = entry.ci95 or (None, None)
        name = "all text" if entry.domain == "all" else entry.domain
        cells = [name, number(entry.before), number(entry.after), number(entry.delta_pct), number(low), number(high)]
        rows.append([*cells, str(entry.tokens), str(entry.windows)])
    columns = ["domain", "perplexity before", "perplexity after", "change (%)", "95 % from (%)", "95 % to (%)"]
    columns += ["scored tokens", "windows"]
    return Table("t-ppl", "Perplexity by domain", columns, rows[:-1], frozenset({0}), (rows[-1],))


def gate_table(gate: Gate) -> Table:
    """Every plan of a gate's front: predicted, measured, accepted or refused and why."""
    bounds = {"accuracy": gate.bounds.max_accuracy_drop, "perplexity": gate.bounds.max_perplexity_rise}
    shown = [name for name, bound in bounds.items() if bound is not None]
    columns = ["plan", "gate", "why", "LIS (predicted)", "quality loss (predicted, %)", "replicas", "experts quantized"]
    for name in shown:
        word, unit, items = ("drop", "points", "documents") if name == "accuracy" else ("rise", "%", "windows")
        columns += [f"{name} {word} ({unit})", f"95 % from ({unit})", f"95 % to ({unit})", f"allowed ({unit})"]
        columns += [items, f"{items} that would resolve it"]
    rows = []
    for number_, entry in enumerate(gate.front, 1):
        cells = ["unchanged" if entry.unchanged else str(number_), entry.state, entry.reason, number(entry.lis)]
        cells += [number(100 * entry.quality_loss), str(entry.replicas), str(entry.quantized)]
        found = {one.measure: one for one in entry.measured}
        for name in shown:
            one = found.get(name)  # type: ignore[call-overload]
            if one is None:
                cells += [""] * 6
                continue
            cells += [number(one.loss), number(one.ci95[0]), number(one.ci95[1]), number(one.bound)]
            cells += [str(one.n), "" if one.needed is None else str(one.needed)]
        rows.append(cells)
    return Table("t-gate", "Plans of the front", columns, rows, frozenset({0, 1, 2}))


def made_table(run: Run) -> Table:
    """How the run was made: model, data, profile, plan, options, result, versions."""
    plan, meta, metrics = run.plan, run.profile.meta, run.metrics
    sections: dict[str, Mapping[str, Any]] = {
        "model": vars(plan.model),
        "profile": {**meta, "sha256": plan.profile_sha256},
        "plan": {
            "preset": plan.preset,
            "seed": plan.seed,
            "ranks": plan.ranks,
            **vars(plan.budget),
            **{f"predicted {name} (in sample)": value for name, value in plan.predicted.items()},
        },
        "option": metrics.options,
        "result": metrics.summary.model_dump(mode="json"),
        "made with": metrics.made_with.model_dump(),
    }
    rows = [
        [section, str(name), plain(value)] for section, values in sections.items() for name, value in values.items()
    ]
    return Table("t-made", "Everything the run was made with", ["part", "name", "value"], rows, frozenset({0, 1, 2}))


def plain(value: Any) -> str:
    """Any JSON value on one line; text stays as it is."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
