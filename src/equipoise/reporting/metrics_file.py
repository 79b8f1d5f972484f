"""`metrics.json` of a run: everything `equipoise balance` measured, as a typed, checked, versioned document.

    {"format": "equipoise-metrics", "version": 1, "summary": {...}, "layers": [{...} x L],
     "heldout_counts": [[...E] x L], "heldout_slots": [[...S_l] x L],
     "bytes_before": {"original": ...}, "bytes_after": {"original": ..., "int8": ...},
     "perplexity": [{"domain": "all", ...}, ...], "made_with": {...}, "options": {...},
     "gate": {...}}                                                    (`gate_metrics`; only of a run with a gate)

Unknown keys are refused everywhere but in `summary` (the last JSON line of `balance`, which may say more) and
`options`. Beyond the schema the figures must agree with each other: layers add up to totals, means are means,
and each layer's LIS is the LIS of the counts in the same file, so that a report never shows two truths.

L MoE layers, E routed experts of a layer, S_l slots of layer l.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from equipoise import metrics as measures
from equipoise.errors import InputError
from equipoise.files.atomic import atomic_file
from equipoise.files.documents import validated
from equipoise.reporting.gate_metrics import Gate, check_gate

FORMAT = "equipoise-metrics"
VERSION = 1
TOLERANCE = 1e-3
"""Relative: how far a stated figure may lie from the one recomputed (a writer may have rounded)."""

Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Imbalance = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _absent(value: Any) -> Any:
    """An interval whose ends are both null or NaN (one window shows no spread) is no interval."""
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(v is None or v != v for v in value):
        return None
    return value


# JSON has no tuples; strict mode would refuse the list that stands for one.
Interval = Annotated[Annotated[tuple[Finite, Finite], Field(strict=False)] | None, BeforeValidator(_absent)]
PrecisionName = Literal["original", "int8", "int8_weight_only", "float16"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Summary(_Strict):
    """The last JSON line of `equipoise balance`; further keys are kept as they are.

    Attributes:
        lis_before: LIS of the original model on held-out text, counts pooled, mean over layers.
        lis_after: the same of the balanced model, over slots.
        lis_before_in_sample: of the original model on the calibration text the plan was made from.
        lis_after_in_sample: of the plan on that same text: not a result, a sanity check.
        lis_before_batch: held out, mean over batches and layers instead of pooled counts.
        lis_after_batch: the same of the balanced model.
        bytes_before: bytes of the routed experts' tensors in the original model.
        bytes_after: bytes of all slots' tensors in the balanced model.
        budget: bytes allowed, as a multiple of `bytes_before`.
        ppl_before: held-out perplexity of the original model.
        ppl_after: of the balanced model, on the same windows.
        ppl_delta_pct: change, percent.
        ppl_delta_ci95: 95 % interval of the change, percent; null when there was too little text for one.
        replicas: spare slots over all layers.
        quantized: experts left without a slot at the original precision, over all layers.
        tokens_quantized: share (0 to 1) of held-out token selections that ran on a lower-precision slot.
        reload_max_abs_diff: largest difference of logits between the model in memory and the saved one.
        out: where the run was written.
        seconds: wall time of the run.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    lis_before: Imbalance
    lis_after: Imbalance
    lis_before_in_sample: Imbalance
    lis_after_in_sample: Imbalance
    lis_before_batch: Imbalance
    lis_after_batch: Imbalance
    bytes_before: Count
    bytes_after: Count
    budget: Positive
    ppl_before: Positive
    ppl_after: Positive
    ppl_delta_pct: Finite
    ppl_delta_ci95: Interval
    replicas: Count
    quantized: Count
    tokens_quantized: Share
    reload_max_abs_diff: Imbalance
    out: str
    seconds: Imbalance


class LayerMetrics(_Strict):
    """One MoE layer; the fields mean what they mean in `Summary`.

    Attributes:
        layer: the model's own number of the layer.
        name: module path of the layer's experts.
    """

    layer: Count
    name: str
    lis_before: Imbalance
    lis_after: Imbalance
    lis_after_in_sample: Imbalance
    bytes_before: Count
    bytes_after: Count
    replicas: Count
    quantized: Count
    tokens_quantized: Share


class DomainPerplexity(_Strict):
    """Held-out perplexity on one domain of the text; domain `all` is the pooled figure.

    Attributes:
        domain: its name.
        before: of the original model.
        after: of the balanced model, on the same windows.
        delta_pct: change, percent.
        ci95: paired 95 % interval of the change, percent; null when there were too few windows for one.
        tokens: scored tokens.
        windows: windows of text.
    """

    domain: str
    before: Positive
    after: Positive
    delta_pct: Finite
    ci95: Interval
    tokens: Count
    windows: Count


class MadeWith(_Strict):
    """Versions of what made the run, and the processor it ran on."""

    equipoise: str
    torch: str
    transformers: str
    numpy: str
    python: str
    cpu: str


class Metrics(_Strict):
    """The whole file.

    Attributes:
        format: always `equipoise-metrics`.
        version: of the format.
        summary: the run in one object.
        layers: L entries in the profile's order.
        heldout_counts: [L][E] selections of each expert by the original model on held-out text.
        heldout_slots: [L][S_l] tokens that ran on each slot of the balanced model, in the plan's order.
        bytes_before: precision -> bytes of the routed experts.
        bytes_after: precision -> bytes of the slots.
        perplexity: one entry a domain, and `all`.
        made_with: versions.
        options: every option the run was made with, any JSON value.
        gate: the plans an accuracy gate tried; None without one.
    """

    format: Literal["equipoise-metrics"]
    version: int
    summary: Summary
    layers: Annotated[list[LayerMetrics], Field(min_length=1)]
    heldout_counts: list[list[Count]]
    heldout_slots: list[list[Count]]
    bytes_before: dict[PrecisionName, Count]
    bytes_after: dict[PrecisionName, Count]
    perplexity: Annotated[list[DomainPerplexity], Field(min_length=1)]
    made_with: MadeWith
    options: dict[str, Any]
    gate: Gate | None = None

    @property
    def pooled(self) -> DomainPerplexity:
        """The entry of domain `all`."""
        return next(entry for entry in self.perplexity if entry.domain == "all")


def metrics_from_json(document: Any) -> Metrics:
    """Build metrics from JSON values and check all of it.

    Raises:
        InputError: naming the key and what is wrong with it.
    """
    found = validated(
        Metrics, document, what="metrics are", format=FORMAT, version=VERSION, command="equipoise balance"
    )
    return check_metrics(found)


def _same(stated: float, found: float, what: str) -> None:
    if not math.isclose(stated, found, rel_tol=TOLERANCE, abs_tol=1e-9):
        raise InputError(f"{what} is {stated:g}, but the rest of the file says {found:g}; make the run again")


def check_metrics(metrics: Metrics) -> Metrics:
    """Check what no schema can: shapes fit, layers add up to the totals, stated LIS are those of the counts.

    Raises:
        InputError: naming the figure and both values.
    """
    layers, summary = metrics.layers, metrics.summary
    for name, rows in (("heldout_counts", metrics.heldout_counts), ("heldout_slots", metrics.heldout_slots)):
        if len(rows) != len(layers):
            raise InputError(f"{name} has {len(rows)} rows for {len(layers)} layers")
    experts = len(metrics.heldout_counts[0])
    for layer, counts, slots in zip(layers, metrics.heldout_counts, metrics.heldout_slots, strict=True):
        where = f"layer {layer.layer}"
        if len(counts) != experts or not experts:
            raise InputError(f"{where}: heldout_counts has {len(counts)} experts, the first layer has {experts}")
        if len(slots) < experts:
            raise InputError(f"{where}: heldout_slots has {len(slots)} slots for {experts} experts")
        _same(layer.lis_before, float(measures.lis(counts)), f"{where}: lis_before")
        _same(layer.lis_after, float(measures.slot_lis(slots, experts)), f"{where}: lis_after")
    for key in ("lis_before", "lis_after", "lis_after_in_sample"):
        mean = float(np.mean([getattr(layer, key) for layer in layers]))
        _same(getattr(summary, key), mean, f"summary.{key}")
    for key in ("bytes_before", "bytes_after", "replicas", "quantized"):
        _total(key, getattr(summary, key), sum(getattr(layer, key) for layer in layers), "the layers")
    for key in ("bytes_before", "bytes_after"):
        _total(key, getattr(summary, key), sum(getattr(metrics, key).values()), f"{key} by precision")
    names = [entry.domain for entry in metrics.perplexity]
    if names.count("all") != 1 or len(set(names)) != len(names):
        raise InputError("perplexity needs exactly one entry of domain 'all' and no domain twice")
    _same(summary.ppl_before, metrics.pooled.before, "summary.ppl_before")
    _same(summary.ppl_after, metrics.pooled.after, "summary.ppl_after")
    if metrics.gate is not None:
        check_gate(metrics.gate, summary.replicas, summary.quantized)
    return metrics


def _total(key: str, stated: int, found: int, where: str) -> None:
    if stated != found:
        raise InputError(f"summary.{key} is {stated:,}, but {where} add up to {found:,}; make the run again")


def load_metrics(path: Path) -> Metrics:
    """Read and check `metrics.json`.

    Raises:
        InputError: with the file, the key, and what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such metrics: {path}; make them with `equipoise balance`")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, a number too long
        raise InputError(f"metrics {path} are not JSON ({error})") from error
    try:
        return metrics_from_json(document)
    except InputError as error:
        raise InputError(f"metrics {path}: {error}") from None


def save_metrics(metrics: Metrics, path: Path) -> None:
    """Write `metrics.json`, whole or not at all: one key a line, one line a layer.

    Raises:
        InputError: the figures do not agree with each other; nothing is written.
    """
    check_metrics(metrics)
    lines = []
    for key, value in metrics.model_dump(mode="json").items():
        if key == "gate" and value is None:
            continue  # a run without a gate is written as before there were any
        if key in ("layers", "heldout_counts", "heldout_slots", "perplexity"):
            rows = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in value)
            lines.append(f' "{key}": [\n{rows}\n ]')
        else:
            lines.append(f' "{key}": {json.dumps(value, allow_nan=False)}')
    with atomic_file(Path(path)) as partial:
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
