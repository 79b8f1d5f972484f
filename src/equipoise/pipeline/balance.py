"""`balance`: load, profile, plan, apply, save, reload in a fresh process, evaluate before and after, report.

Everything that can be refused is refused before the weights are read. The run directory appears complete or not
at all.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equipoise.checkpoint import apply_checkpoint
from equipoise.demo import calibration_text, heldout_text
from equipoise.errors import InputError
from equipoise.evaluation.data import batches
from equipoise.evaluation.perplexity import paired_difference
from equipoise.files import atomic_directory, require_destination, save_plan, save_profile
from equipoise.gating.gate import gate
from equipoise.gating.reading import read
from equipoise.gating.result import GateResult
from equipoise.metrics import lis, slot_lis, slot_load
from equipoise.models.loading import DEMO, ModelSource, empty_model, find_source, load_model, load_tokenizer
from equipoise.options import GateOptions, PlanOptions, ProfileOptions
from equipoise.pipeline.gated import gate_as_json, prepare_gate
from equipoise.pipeline.heldout import Heldout, run_heldout
from equipoise.pipeline.reload import logits_of, reload_difference
from equipoise.pipeline.text import Split, split_text, thin
from equipoise.pipeline.versions import made_with
from equipoise.planning import plan as make_plan
from equipoise.profiling import profile as measure
from equipoise.progress import Track, quietly
from equipoise.reporting import save_metrics, write_report
from equipoise.reporting.metrics_file import Metrics, metrics_from_json
from equipoise.runtime import apply, expert_bytes
from equipoise.types import Plan, Profile


@dataclass(frozen=True)
class BalanceOptions:
    """How the main job treats its text.

    Attributes:
        calibration: share of the windows of the data that calibrates when no held-out files are given; the rest is
            held out. None: 0.1 for the preset paper (its protocol), else 0.5.
        eval_tokens: score on at most about this many held-out tokens (0 = all).
    """

    calibration: float | None = None
    eval_tokens: int = 0

    def __post_init__(self) -> None:
        if self.calibration is not None and not 0 < self.calibration < 1:
            raise InputError(f"calibration is a share of the windows in (0, 1), got {self.calibration}")
        if self.eval_tokens < 0:
            raise InputError(f"eval-tokens must not be negative, got {self.eval_tokens}")


@dataclass(frozen=True)
class BalanceResult:
    """What a run measured. `metrics` is what `metrics.json` holds; `gate` what a gate tried, None without one."""

    metrics: Metrics
    plan: Plan
    gate: GateResult | None = None


def balance(
    model: str | Path | None,
    out: str | Path,
    *,
    data: Sequence[Path] = (),
    heldout: Sequence[Path] = (),
    options: BalanceOptions | None = None,
    profile_options: ProfileOptions | None = None,
    plan_options: PlanOptions | None = None,
    gate_options: GateOptions | None = None,
    force: bool = False,
    track: Track = quietly,
) -> BalanceResult:
    """Balance a model and prove it.

    Args:
        model: local directory or hub id; None: the bundled demo model.
        out: run directory.
        data: text to calibrate on; empty: the bundled text (demo model only).
        heldout: text to score on; empty: a part of `data`.
        options: how the text is used.
        profile_options: how load and importance are measured.
        plan_options: how the plan is made.
        gate_options: bounds on the loss of quality; with one the plan is searched for on the Pareto front.
        force: replace an existing run directory.
        track: progress.

    Raises:
        InputError: anything about model, text, options or destination that will not do.
    """
    began = time.monotonic()
    options, profile_options = options or BalanceOptions(), profile_options or ProfileOptions()
    plan_options, gate_options = plan_options or PlanOptions(), gate_options or GateOptions()
    if plan_options.low_precision is not None:  # what is planned for is what is measured
        profile_options = dataclasses.replace(profile_options, low_precision=plan_options.low_precision)
    out = Path(out)
    require_destination(out, force)
    source = find_source(model if model is not None else DEMO)
    require_destination(out, force, [source.path, *data, *heldout, *gate_options.gate_text])
    empty_model(source)
    split = _split(source, data, heldout, options, profile_options, plan_options)
    prepared = None
    if gate_options.active:
        prepared = prepare_gate(source, split, gate_options, profile_options, plan_options, data, heldout)
        split = prepared.split

    loaded = load_model(source.name, tokenizer=prepared is not None and prepared.directory is not None)
    network = loaded.model
    seq_len, rows = profile_options.seq_len, profile_options.batch_size
    chosen = thin(split.calibration, seq_len, fraction=profile_options.fraction, max_tokens=profile_options.max_tokens)
    calibration = batches(chosen, rows, network.config)
    scored = batches(thin(split.heldout, seq_len, max_tokens=options.eval_tokens), rows, network.config)
    profile = measure(network, calibration, profile_options, track=track, model_name=source.name, data=split.described)
    gated = None
    if prepared is None:
        plan = make_plan(profile, plan_options)
    before = run_heldout(network, scored, track, "evaluating the original")
    bytes_before = expert_bytes(network)
    if prepared is not None:
        original = read(loaded, gate_options, prepared.text, prepared.directory, rows, track)
        del loaded, network
        gc.collect()  # the gate loads a model for each plan it tries
        gated = gate(
            source.name,
            profile,
            gate_options,
            text=prepared.text,
            plan_options=plan_options,
            batch_size=rows,
            original=original,
            track=track,
        )
        plan = gated.plan
        loaded = load_model(source.name, tokenizer=False)
        network = loaded.model
    apply(network, plan)
    after = run_heldout(network, scored, track, "evaluating the balanced")
    bytes_after = expert_bytes(network)
    logits = logits_of(network, scored[0])
    del loaded, network
    gc.collect()

    with atomic_directory(out, force) as partial:
        save_profile(profile, partial / "profile.npz")
        save_plan(plan, partial / "plan.json")
        if gated is not None and gated.refused:
            save_plan(gated.refused[0].plan, partial / "refused-plan.json")
        written = apply_checkpoint(source.name, plan, partial / "model", track=track)
        _same_bytes(plan, bytes_after, written)
        difference = reload_difference(partial / "model", scored[0], logits, torch.get_num_threads())
        document = _document(profile, plan, before, after, bytes_before, bytes_after)
        document["summary"] |= {
            "reload_max_abs_diff": difference,
            "model": source.name,
            "preset": plan.preset,
            "calibration_tokens": int(profile.meta["tokens"]),
            "heldout_tokens": int(after.text.tokens.sum()),
            "out": str(out),
            "seconds": time.monotonic() - began,
        }
        document["options"] = {
            **dataclasses.asdict(options),
            **dataclasses.asdict(profile_options),
            **dataclasses.asdict(plan_options),
            "data": split.described,
        }
        if gated is not None:
            document["gate"] = gated.to_json()
            document["options"] |= gate_as_json(gate_options)
        metrics = metrics_from_json(document)
        save_metrics(metrics, partial / "metrics.json")
        write_report(partial)
    return BalanceResult(metrics, plan, gated)


def _split(
    source: ModelSource,
    data: Sequence[Path],
    heldout: Sequence[Path],
    options: BalanceOptions,
    profile_options: ProfileOptions,
    plan_options: PlanOptions,
) -> Split:
    """Calibration and held-out windows; the demo model comes with text of its own."""
    names = ""
    share = options.calibration
    if not data:
        if source.name != DEMO:
            raise InputError("no calibration text: give --data FILE (.jsonl, .jsonl.gz with a text field, or .txt)")
        names = "the bundled text"
        if plan_options.preset == "paper" or share is not None or heldout:
            data = [calibration_text(), heldout_text()] if not heldout else [calibration_text()]
        else:
            data, heldout = [calibration_text()], [heldout_text()]
    if share is None:
        share = 0.1 if plan_options.preset == "paper" else 0.5
    tokenizer = load_tokenizer(source)
    return split_text(tokenizer, data, heldout, seq_len=profile_options.seq_len, share=share, names=names)


def _same_bytes(plan: Plan, in_memory: dict[str, dict[str, int]], written: dict[str, dict[str, int]]) -> None:
    """The plan's bytes, those in memory and those on disk must be one figure."""
    total = sum(sum(sizes.values()) for sizes in in_memory.values())
    differs = [name for name, sizes in written.items() if sizes != in_memory[name]]
    if total != plan.budget.plan_bytes or differs:
        raise RuntimeError(
            f"bytes disagree: {total:,} in memory, {plan.budget.plan_bytes:,} planned; on disk differ: {differs}"
        )


def _quantized_share(slots: np.ndarray, layer: Any) -> float:
    """Share of the selections of a layer that ran on a slot of lower precision."""
    low = np.array([slot.precision != "original" for slot in layer.slots])
    return float(slots[low].sum() / max(slots.sum(), 1))


def _document(
    profile: Profile,
    plan: Plan,
    before: Heldout,
    after: Heldout,
    bytes_before: dict[str, dict[str, int]],
    bytes_after: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """`metrics.json` as plain values, less what only the end of the run knows."""
    in_sample_before = lis(profile.counts)
    in_sample = np.array(
        [
            float(slot_lis(slot_load(n, layer), layer.num_experts))
            for n, layer in zip(profile.counts, plan.layers, strict=True)
        ]
    )
    shares = [_quantized_share(s, layer) for s, layer in zip(after.slots, plan.layers, strict=True)]
    selections = sum(int(s.sum()) for s in after.slots)
    on_low = sum(share * s.sum() for share, s in zip(shares, after.slots, strict=True))
    layers = [
        {
            "layer": layer.layer,
            "name": layer.name,
            "lis_before": float(before.lis[i]),
            "lis_after": float(after.lis[i]),
            "lis_after_in_sample": float(in_sample[i]),
            "bytes_before": sum(bytes_before[layer.name].values()),
            "bytes_after": sum(bytes_after[layer.name].values()),
            "replicas": len(layer.slots) - layer.num_experts,
            "quantized": int(layer.quantized().sum()),
            "tokens_quantized": shares[i],
        }
        for i, layer in enumerate(plan.layers)
    ]
    total_before, total_after = _by_precision(bytes_before), _by_precision(bytes_after)
    perplexity = [_domain("all", before, after, None)]
    domains = list(dict.fromkeys(before.text.domains))
    if len(domains) > 1:
        perplexity += [_domain(name, before, after, name) for name in domains]
    pooled = perplexity[0]
    return {
        "format": "equipoise-metrics",
        "version": 1,
        "summary": {
            "lis_before": float(before.lis.mean()),
            "lis_after": float(after.lis.mean()),
            "lis_before_in_sample": float(in_sample_before.mean()),
            "lis_after_in_sample": float(in_sample.mean()),
            "lis_before_batch": float(before.batch_lis.mean()),
            "lis_after_batch": float(after.batch_lis.mean()),
            "bytes_before": sum(total_before.values()),
            "bytes_after": sum(total_after.values()),
            "budget": plan.budget.limit_bytes / plan.budget.original_bytes,
            "ppl_before": pooled["before"],
            "ppl_after": pooled["after"],
            "ppl_delta_pct": pooled["delta_pct"],
            "ppl_delta_ci95": pooled["ci95"],
            "replicas": plan.num_replicas,
            "quantized": plan.num_quantized,
            "tokens_quantized": float(on_low / max(selections, 1)),
        },
        "layers": layers,
        "heldout_counts": before.counts.tolist(),
        "heldout_slots": [s.tolist() for s in after.slots],
        "bytes_before": total_before,
        "bytes_after": total_after,
        "perplexity": perplexity,
        "made_with": made_with(),
    }


def _by_precision(sizes: dict[str, dict[str, int]]) -> dict[str, int]:
    out: dict[str, int] = {}
    for layer in sizes.values():
        for precision, amount in layer.items():
            out[precision] = out.get(precision, 0) + amount
    return out


def _domain(label: str, before: Heldout, after: Heldout, name: str | None) -> dict[str, Any]:
    """Perplexity before and after on one domain, or on all of the text."""
    a = before.text if name is None else before.text.by_domain()[name]
    b = after.text if name is None else after.text.by_domain()[name]
    delta, (low, high) = paired_difference(a, b)
    return {
        "domain": label,
        "before": a.perplexity,
        "after": b.perplexity,
        "delta_pct": delta,
        "ci95": None if np.isnan(low) else [low, high],
        "tokens": int(a.tokens.sum()),
        "windows": len(a.tokens),
    }
