"""What the measurements of accept.py say: tables with paired 95 % intervals, and the bars."""

from __future__ import annotations

from typing import Any

import data
import numpy as np

from equipoise.evaluation.paired import Measure, compare
from equipoise.evaluation.perplexity import TextResult, half_width, paired_difference
from equipoise.metrics import lis

OVERFIT = ("code", "biomedical")
"""Domains whose held-out loss rose again in training: short streams, read four to five times (results/log.jsonl)."""


def perplexities(dense: dict[str, Any], moe: dict[str, Any]) -> dict[str, Any]:
    """Both models' perplexity, change with interval, and LIS, by domain."""
    results = [
        TextResult(np.array(m["nll"]), np.array(m["tokens"], dtype=np.int64), tuple(m["domains"])) for m in (dense, moe)
    ]
    before, after = (result.by_domain() for result in results)
    table = {}
    for place, domain in enumerate(data.DOMAINS):
        change, (low, high) = paired_difference(before[domain], after[domain])
        table[domain] = {
            "dense": before[domain].perplexity, "moe": after[domain].perplexity, "change_percent": change,
            "low": low, "high": high, "windows": len(before[domain].nll),
            "lis": float(lis(moe["counts"][place]).mean()),
        }  # fmt: skip
    return table


def routing(counts: Any) -> dict[str, Any]:
    """How many experts are the heavy hitter of some domain, layer by layer, from selections [domains, L, E]."""
    heavy = np.asarray(counts).argmax(-1)
    distinct = [len(set(column)) for column in heavy.T]
    pooled = np.asarray(counts).sum(0)
    return {
        "distinct_heavy_hitters": distinct,
        "layers_that_change": int(sum(d > 1 for d in distinct)),
        "layers": len(distinct),
        "lis_all_domains": float(lis(pooled).mean()),
        "smallest_share": float((pooled / pooled.sum(-1, keepdims=True)).min()),
    }


def removals(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Rise of the loss when one expert is removed: nats a token, with the interval over windows, also by domain."""
    rows = []
    for layer, losses in values.items():
        whole = np.array(losses["whole"])
        for expert, removed in enumerate(losses["removed"]):
            change, names = np.array(removed) - whole, np.array(losses["domains"])
            means = {domain: _mean(change[names == domain]) for domain in data.DOMAINS if domain in names}
            elsewhere = _mean(change[~np.isin(names, OVERFIT)])
            rows.append({
                "layer": int(layer), "expert": expert, **_mean(change), "elsewhere": elsewhere, "domains": means,
            })  # fmt: skip
    return rows


def _mean(change: np.ndarray) -> dict[str, float]:
    half = half_width(change)
    return {"rise": float(change.mean()), "low": float(change.mean() - half), "high": float(change.mean() + half)}


def accuracies(dense: dict[str, Any], moe: dict[str, Any]) -> dict[str, Any]:
    """Both models' accuracy in percent and the paired change in points, by task and metric."""
    table: dict[str, Any] = {}
    for task in dense:
        for metric in dense[task]:
            before, after = (
                Measure("share", np.array(m[task][metric]), np.ones(len(m[task][metric]))) for m in (dense, moe)
            )
            change = compare(before, after)
            table.setdefault(task, {})[metric] = {
                "dense": 100 * before.value, "moe": 100 * after.value, "change_points": change.value,
                "low": change.low, "high": change.high, "items": change.n,
            }  # fmt: skip
    return table


def verdict(result: dict[str, Any]) -> dict[str, bool]:
    """The bars."""
    rises = [row["low"] > 0 for row in result["experts"]]
    return {
        "accuracy": all(task["acc"]["change_points"] >= -1.0 and task["acc"]["items"] >= 1000
                        for task in result["accuracy"].values()),
        "perplexity": sum(row["moe"] < row["dense"] for row in result["perplexity"].values()) >= 5,
        "experts": sum(rises) > len(rises) / 2,
        "routing": result["routing"]["layers_that_change"] > result["routing"]["layers"] / 2,
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    """The tables, in Markdown."""
    print("| task | items | dense | MoE | change, points | dense, normalised | MoE, normalised | change, points |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for task, row in result["accuracy"].items():
        cells = [f"{m['dense']:.1f} | {m['moe']:.1f} | {m['change_points']:+.1f} [{m['low']:+.1f}, {m['high']:+.1f}]"
                 for m in (row["acc"], row["acc_norm"])]  # fmt: skip
        print(f"| {task} | {row['acc']['items']} | {cells[0]} | {cells[1]} |")
    print("\n| domain | windows | dense perplexity | MoE perplexity | change, % | LIS |")
    print("|---|---:|---:|---:|---:|---:|")
    for domain, row in result["perplexity"].items():
        print(f"| {domain} | {row['windows']} | {row['dense']:.2f} | {row['moe']:.2f} | "
              f"{row['change_percent']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}] | {row['lis']:.2f} |")  # fmt: skip
    print("\n| layer | expert removed | rise of the loss, 1e-4 nats | without code, biomedical | largest in | there |")
    print("|---:|---:|---:|---:|---|---:|")
    for row in result["experts"]:
        most = max(row["domains"], key=lambda domain: row["domains"][domain]["rise"])
        cells = [_interval(row), _interval(row["elsewhere"]), most, _interval(row["domains"][most])]
        print(f"| {row['layer']} | {row['expert']} | {' | '.join(cells)} |")
    about = result["routing"]
    print(f"\nThe heavy hitter changes between domains in {about['layers_that_change']} of {about['layers']} layers;")
    print(f"distinct ones of {len(data.DOMAINS)} domains, by layer: {about['distinct_heavy_hitters']}.")


def _interval(row: dict[str, float]) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(1e4 * row[name] for name in ("rise", "low", "high")))
