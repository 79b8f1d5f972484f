"""A run directory made of seeded numbers: what `equipoise balance` leaves behind, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from equipoise.files import profile_hash, save_plan, save_profile
from equipoise.metrics import lis, slot_lis, slot_load
from equipoise.reporting.metrics_file import metrics_from_json, save_metrics
from equipoise.types import Budget, LayerPlan, ModelIdentity, Plan, Profile, Slot

DOMAINS = ("encyclopedia", "code", "novels", "mathematics", "conversation")


def _layer(number: int, name: str, counts: np.ndarray, size: int, rng: np.random.Generator, ranks: int) -> LayerPlan:
    """Half of the experts int8; what that frees buys replicas of the busiest, one at a time."""
    experts = len(counts)
    low = set(rng.choice(experts, experts // 2, replace=False).tolist())
    room = experts * size - sum(size // 2 if e in low else size for e in range(experts))
    slots = {e: ["int8" if e in low else "original"] for e in range(experts)}
    while room >= size // 2:
        busiest = max(slots, key=lambda e: counts[e] / len(slots[e]))
        slots[busiest].append("int8")
        room -= size // 2
    flat = [
        Slot(e, precision, i % ranks, 1 / len(held))
        for e, held in slots.items()
        for i, precision in enumerate(sorted(held, key=lambda p: p != "original"))
    ]
    return LayerPlan(number, name, experts, tuple(flat))


BOUNDS = {"accuracy": 0.5, "perplexity": 0.1}
NEEDED = 2400


def gate_of(names: tuple[str, ...], plan: Plan) -> dict[str, Any]:
    """Four plans: refused (too wide), accepted, not tried, passed; and the unchanged model."""

    def one(name: str, scale: float, needed: int | None) -> dict[str, Any]:
        bound = BOUNDS[name]
        ends = [-0.5 * scale * bound, scale * bound]
        return {
            "measure": name,
            "loss": sum(ends) / 2,
            "ci95": ends,
            "bound": bound,
            "n": 600 if name == "accuracy" else 98,
            "inside": ends[1] <= bound,
            "needed": needed,
        }

    def entry(state: str, lis: float, loss: float, scale: float = 0.0) -> dict[str, Any]:
        inside = scale <= 1
        return {
            "unchanged": loss == 0,
            "state": state,
            "lis": lis,
            "quality_loss": loss,
            "replicas": plan.num_replicas if state == "accepted" else 0,
            "quantized": plan.num_quantized if state == "accepted" else 0,
            "quality_weight": 1 - loss if loss else None,
            "measured": [one(name, scale, None if inside else NEEDED) for name in names] if scale else [],
            "reason": f"a reason to be {state}",
        }

    front = [
        entry("refused", 0.9, 0.7, 1.6), entry("accepted", 1.1, 0.4, 0.7), entry("not tried", 1.4, 0.2),
        entry("passed", 1.9, 0.05, 0.3), entry("not tried", 2.9, 0.0),
    ]  # fmt: skip
    return {
        "bounds": {f"max_{n}_{w}": BOUNDS[n] if n in names else None
                   for n, w in (("accuracy", "drop"), ("perplexity", "rise"))},
        "tasks": ["piqa"] if "accuracy" in names else [],
        "items": {what: n for name, what, n in (("accuracy", "documents", 600), ("perplexity", "windows", 98))
                  if name in names},
        "tried": 3,
        "front": front,
        "seconds": 12.5,
    }  # fmt: skip


def make_run(
    path: Path,
    layers: int = 4,
    experts: int = 16,
    seed: int = 0,
    ranks: int = 1,
    names: list[str] | None = None,
    numbers: list[int] | None = None,
    importance: tuple[str, ...] = ("error", "wanda"),
    skew: float = 0.7,
    idle: tuple[int, ...] = (),
    gate: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Write profile.npz, plan.json, metrics.json; return the metrics as JSON values.

    `gate`: bounds (`accuracy`, `perplexity`) of a gate that this plan passed as the second of four.
    """
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    names = names or [f"model.layers.{layer}.mlp.experts" for layer in range(layers)]
    numbers = numbers or list(range(layers))
    tokens, top_k, size = 40_000, min(2, experts), 393_216
    weights = rng.lognormal(0, skew * (0.6 + 0.8 * np.arange(layers)[:, None] / layers), (layers, experts))
    weights /= weights.sum(1, keepdims=True)
    counts = np.stack([rng.multinomial(tokens * top_k, w) for w in weights])
    heldout = np.stack([rng.multinomial(tokens, w) for w in weights])
    counts[list(idle)] = 0
    heldout[list(idle)] = 0
    sizes = {"original": np.full((layers, experts), size), "int8": np.full((layers, experts), size // 2)}
    measured = {
        name: (counts ** (1.0 if name == "error" else 0.4) * rng.lognormal(0, 0.35, counts.shape)).astype(np.float32)
        for name in importance
    }
    meta = {
        "model": "tiny/Synthetic-MoE",
        "model_type": "mixtral",
        "top_k": top_k,
        "dtype": "bfloat16",
        "tokens": tokens,
        "data": "calibration.jsonl.gz",
        "created_by": "tests",
    }
    profile = Profile(counts, np.array(numbers), meta, tuple(names), None, None, measured, sizes)
    save_profile(profile, path / "profile.npz")
    planned = [_layer(numbers[i], names[i], counts[i], size, rng, ranks) for i in range(layers)]
    bytes_of = {"original": size, "int8": size // 2}
    plan_bytes = [sum(bytes_of[s.precision] for s in layer.slots) for layer in planned]
    total = size * layers * experts
    plan = Plan(
        ModelIdentity("tiny/Synthetic-MoE", "mixtral", layers, experts, top_k, "bfloat16"),
        profile_hash(profile),
        "joint",
        seed,
        Budget(total, total, sum(plan_bytes)),
        ranks,
        tuple(planned),
        {"lis": float(np.mean([slot_lis(slot_load(c, p), experts) for c, p in zip(counts, planned, strict=True)]))},
    )
    save_plan(plan, path / "plan.json")
    slots = [np.rint(slot_load(h, p)).astype(int) for h, p in zip(heldout, planned, strict=True)]
    rows = []
    for i, layer in enumerate(planned):
        low = sum(int(n) for n, s in zip(slots[i], layer.slots, strict=True) if s.precision != "original")
        rows.append(
            {
                "layer": numbers[i],
                "name": names[i],
                "lis_before": float(lis(heldout[i])),
                "lis_after": float(slot_lis(slots[i], experts)),
                "lis_after_in_sample": float(slot_lis(slot_load(counts[i], layer), experts)),
                "bytes_before": size * experts,
                "bytes_after": plan_bytes[i],
                "replicas": len(layer.slots) - experts,
                "quantized": int(layer.quantized().sum()),
                "tokens_quantized": low / max(1, int(slots[i].sum())),
            }
        )
    mean = {
        key: float(np.mean([row[key] for row in rows])) for key in ("lis_before", "lis_after", "lis_after_in_sample")
    }
    delta = rng.normal(0.02, 0.12, len(DOMAINS))
    domains = [
        {
            "domain": name,
            "before": 8.0 + i * 3.1,
            "after": (8.0 + i * 3.1) * (1 + d / 100),
            "delta_pct": float(d),
            "ci95": [float(d) - 0.15 - 0.02 * i, float(d) + 0.15 + 0.02 * i],
            "tokens": 5100 + i,
            "windows": 20,
        }
        for i, (name, d) in enumerate(zip(DOMAINS, delta, strict=True))
    ]
    pooled = {
        "domain": "all",
        "before": 12.5,
        "after": 12.504,
        "delta_pct": 0.032,
        "ci95": [-0.05, 0.114],
        "tokens": 25510,
        "windows": 100,
    }
    by_precision = {
        name: sum(bytes_of[name] for p in planned for s in p.slots if s.precision == name) for name in bytes_of
    }
    document = {
        "format": "equipoise-metrics",
        "version": 1,
        "summary": {
            **mean,
            "lis_before_in_sample": float(lis(counts).mean()),
            "lis_before_batch": mean["lis_before"] * 1.2,
            "lis_after_batch": mean["lis_after"] * 1.3,
            "bytes_before": total,
            "bytes_after": sum(plan_bytes),
            "budget": 1.0,
            "ppl_before": 12.5,
            "ppl_after": 12.504,
            "ppl_delta_pct": 0.032,
            "ppl_delta_ci95": [-0.05, 0.114],
            "replicas": plan.num_replicas,
            "quantized": plan.num_quantized,
            "tokens_quantized": float(np.mean([row["tokens_quantized"] for row in rows])),
            "reload_max_abs_diff": 0.0,
            "out": "run",
            "seconds": 61.5,
            "preset": "joint",
            "model": "tiny/Synthetic-MoE",
        },
        "layers": rows,
        "heldout_counts": heldout.tolist(),
        "heldout_slots": [row.tolist() for row in slots],
        "bytes_before": {"original": total},
        "bytes_after": by_precision,
        "perplexity": [pooled, *domains],
        "made_with": {
            "equipoise": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "numpy": "2.4.6",
            "python": "3.11.9",
            "cpu": "a processor, 2 cores",
        },
        "options": {
            "budget": 1.0,
            "importance": "error",
            "max_quantized": 0.5,
            "seed": seed,
            "data": ["calibration.jsonl.gz"],
        },
    }
    if gate:
        document["gate"] = gate_of(gate, plan)
    save_metrics(metrics_from_json(document), path / "metrics.json")
    return document
