"""The first table of the document: balance, memory, accuracy and speed of every variant, and the bars beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import domains
import importance_truth
import importance_words
import product_change
from sections import Section, interval, table
from subject import VARIANTS
from table2 import changes, mean_of, show

CHANGE_BAR, INTERVAL_BAR, LIS_BAR, SPEARMAN_BAR = 0.3, 0.6, domains.BAR, 0.7


def section(values: Mapping[str, Any]) -> Section:
    """The headline, from the values of the other sections; a cell that has not been run says so.

    Args:
        values: `table2`, `speed`, `domains`, `importance`, as their `measure` gives them, or None.
    """
    own, speed = values["table2"], values.get("speed")
    rows = []
    for variant in VARIANTS:
        change = changes(own, variant).get("pooled") if variant != "original" else None
        kinds = (speed or {}).get("rows", {}).get(variant, {})
        ratios = [f"{kinds[kind]['ratio']:.2f}" for kind in ("prefill", "decode") if kind in kinds]
        rows.append(
            [
                variant,
                show(mean_of(own, variant, "each")),
                show(mean_of(own, variant, "task")),
                f"{own['bytes'][variant]:.3f}",
                f"{interval(change['value'], change['low'], change['high'], 2)} (n {change['n']})" if change else "",
                " / ".join(ratios) if ratios else ("1" if variant == "original" else "not run"),
            ]
        )
    columns = (
        "", "LIS of a prompt", "LIS of a task", "expert bytes", "accuracy, points, pooled", "speed, prefill / decode",
    )  # fmt: skip
    return Section("Headline", table(columns, rows) + "\n\n" + "\n".join(f"- {line}" for line in bars(values)))


def bars(values: Mapping[str, Any]) -> list[str]:
    """What the project set itself, and whether this run shows it."""
    out = []
    pooled = changes(values["table2"], "joint").get("pooled")
    if pooled:
        inside = abs(pooled["value"]) <= CHANGE_BAR and max(abs(pooled["low"]), abs(pooled["high"])) <= INTERVAL_BAR
        out.append(
            f"joint, accuracy pooled over {pooled['n']} documents: "
            f"{interval(pooled['value'], pooled['low'], pooled['high'], 2)} points; bar: within {CHANGE_BAR} with the "
            f"interval inside {INTERVAL_BAR}: {_verdict(inside)}."
        )
    out.append(
        f"joint, bytes of the experts: {values['table2']['bytes']['joint']:.4f} of the original; bar: not above 1: "
        f"{_verdict(values['table2']['bytes']['joint'] <= 1)}."
    )
    if text := values.get("domains"):
        for plan, words in (
            (domains.OWN, "at the defaults"),
            (domains.FILLED, "with --slot-weight 0"),
        ):
            top = domains.worst(text, plan)
            out.append(
                f"joint {words}, held-out LIS on in-domain text: at most {top:.2f}; bar {LIS_BAR:.2f}: "
                f"{_verdict(top <= LIS_BAR)}."
            )
    if truth := values.get("importance"):
        out.append(_predicts(truth))
    return out


def _predicts(truth: Mapping[str, Any]) -> str:
    """Whether `error` predicts the divergence that a change of one expert causes, and what does."""
    values = dict(truth)
    found: dict[str, dict[str, float]] = {}
    for (kind, change, name), one in importance_words.agreements(values, importance_truth.scores(values)).items():
        if kind == "divergence":
            found.setdefault(change, {})[name] = one.pooled[0]
    best = {change: max(own, key=lambda name: own[name]) for change, own in found.items()}
    figures = ", ".join(
        f"{change}: {own['error']:+.2f}, best `{best[change]}` {own[best[change]]:+.2f}"
        for change, own in found.items()
    )
    met = found[product_change.NAME]["error"] >= SPEARMAN_BAR
    return (
        f"importance `error`, Spearman with the true divergence over all experts of several layers ({figures}); bar "
        f"{SPEARMAN_BAR} for {product_change.NAME}, which it is measured for: {_verdict(met)}."
    )


def _verdict(met: bool) -> str:
    return "**met**" if met else "**missed**"
