"""Load is not importance, and which measure knows what an expert is worth (paper: Finding ii, Figure 2, Table 5).

Three parts, all of the original model:

    profile     load, `wanda` and `error` of every expert of every layer, on calibration tokens, by the product
    singles     experts of several layers changed one at a time (`product_change`, `expert_changes`): divergence and
                rise of the loss on tokens that calibration has not seen, beside what might predict them
                (`expert_predictors`)
    together    the expert that a measure calls least, or most, important in every layer at once, changed

Everything is in float32, the profile too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import expert_changes
import expert_predictors
import importance_words
import measured_layer
import numpy as np
import numpy.typing as npt
import product_change
import torch
from expert_changes import CHANGES, Bench, changed, singles, spread
from expert_predictors import observe, predict
from importance_pictures import draw_load, draw_truth
from importance_words import NAMES
from sections import Section, picture

import equipoise as eq
from equipoise.models import load_model
from equipoise.options import ProfileOptions
from equipoise.profiling import float32, importance, lowered, sampling, sensitivity
from equipoise.types import Profile

Arrays = dict[str, npt.NDArray[Any]]
Work = Callable[[], Arrays]

CHOOSERS = ("wanda, as the paper reads it", "wanda, higher is dearer", "error", "frequency", "random")
DEPTHS = 5
"""Layers whose experts are changed one at a time, evenly spread."""


def sizes(quick: bool) -> dict[str, tuple[int, int]]:
    """Windows and their tokens of each part."""
    if quick:
        return {"singles": (2, 32), "calibration": (2, 64), "together": (2, 32)}
    return {"singles": (32, 96), "calibration": (24, 128), "together": (8, 128)}


def depths(layers: int, quick: bool) -> list[int]:
    """Which layers: all of them where there are few."""
    if quick:
        return [layers // 2]
    return sorted({round(layers * (i + 1) / (DEPTHS + 1)) for i in range(DEPTHS)} & set(range(layers)))


def measure(subject: Any) -> dict[str, Any]:
    """Everything of the section; each layer's truth is kept as it is found, so a stopped run goes on.

    Args:
        subject: `subject.Subject`.
    """
    plan = sizes(subject.quick)
    rest, domains = spread(subject.windows("rest"), *plan["singles"])
    calibration, _ = spread(subject.windows(), *plan["calibration"])
    held: dict[str, Any] = {}

    def model() -> Any:
        if subject.dtype == "float32":
            return subject.model("original").model
        if not held:  # not before it is needed: all may be kept already
            loaded = load_model(subject.moe, dtype="float32", device=subject.device, tokenizer=False).model
            if loaded.device.type == "cuda":
                # Grouped products in float32, and their gradients, are not in every torch for GPUs.
                loaded.set_experts_implementation("eager")
            held["model"] = loaded
        return held["model"]

    def kept(name: str, work: Work, size: str, *code: Any, **more: Any) -> Arrays:
        inputs = subject.inputs(size=plan[size], **more)
        arrays: Arrays = subject.store.arrays(f"importance/{name}", inputs, work, [expert_changes, *code])
        return arrays

    profile = _profile(subject, model, calibration)
    layers = depths(profile.num_layers, subject.quick)
    truth: dict[str, dict[str, list[Any]]] = {c: {"divergence": [], "rise": []} for c in product_change.ALL}
    predictors: dict[str, dict[str, list[Any]]] = {c: {n: [] for n in NAMES} for c in CHANGES}
    predicted = kept(
        "predictors",
        lambda: _predictors(model(), calibration, layers),
        "calibration",
        expert_predictors,
        measured_layer,
        layers=layers,
    )
    for row, layer in enumerate(layers):
        arrays = kept(f"layer {layer}", lambda layer=layer: _truth(model(), rest, layer), "singles")
        arrays |= kept(
            f"layer {layer}, {product_change.NAME}",
            lambda layer=layer: _product_truth(model(), rest, layer),
            "singles",
            product_change,
            lowered,
        )
        for change, own in truth.items():
            for name in own:
                own[name].append(arrays[f"{change} {name}"].tolist())
        for change in CHANGES:
            for name in NAMES:
                predictors[change][name].append(predicted[f"{change} {name}"][row].tolist())
    return {
        "load": (profile.counts / profile.counts.sum(1, keepdims=True)).tolist(),
        "importance": {name: profile.importance[name].astype(float).tolist() for name in ("wanda", "error")},
        "layers": layers,
        "tokens": int(rest.numel()),
        "calibration_tokens": int(calibration.numel()),
        "domains": list(domains),
        "truth": truth,
        "predictors": predictors,
        "together": _together(model, kept, subject, profile, plan["together"]),
    }


def _profile(subject: Any, model: Callable[[], Any], ids: torch.Tensor) -> Profile:
    """What the product says of every expert after calibration windows [N, W], kept; its `error` is for W8A8."""
    code = [float32, importance, lowered, sampling, sensitivity]
    path = subject.store.path("importance profile", subject.inputs(size=list(ids.shape)), code, "npz")

    def make() -> None:
        tokens = ids.numel()
        options = ProfileOptions(importance_tokens=tokens, layer_tokens=tokens, low_precision="int8")
        batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)]
        eq.save_profile(eq.profile(model(), batches, options), path)

    subject.store.file(path, "importance profile", make)
    return eq.load_profile(path)


def _predictors(model: Any, ids: Any, layers: list[int]) -> Arrays:
    seen = observe(model, ids, layers)
    found = {layer: predict(model.model.layers[layer].mlp.experts, seen.pop(layer)) for layer in layers}
    for layer, own in found.items():
        errors = {change: values["error x token"] for change, values in own.items()}
        for change, values in measured_layer.measured(model, ids, layer, errors).items():
            own[change][measured_layer.NAME] = values
    return {f"{c} {n}": np.array([found[layer][c][n] for layer in layers]) for c in CHANGES for n in NAMES}


def _truth(model: Any, ids: Any, layer: int) -> Arrays:
    bench = Bench(model, ids, layer)
    effects = {change: singles(bench, change) for change in CHANGES}
    return {f"{c} {name}": getattr(e, name) for c, e in effects.items() for name in ("divergence", "rise")}


def _product_truth(model: Any, ids: Any, layer: int) -> Arrays:
    effect = product_change.singles(Bench(model, ids, layer))
    return {f"{product_change.NAME} {name}": getattr(effect, name) for name in ("divergence", "rise")}


def scores(values: dict[str, Any], seed: int = 0) -> dict[str, npt.NDArray[np.float64]]:
    """Measures of an expert's worth, [L, E], larger = dearer: `CHOOSERS`."""
    load, wanda = np.array(values["load"]), np.array(values["importance"]["wanda"])
    drawn = np.random.default_rng(seed).random(load.shape)
    return dict(zip(CHOOSERS, (-wanda, wanda, np.array(values["importance"]["error"]), load, drawn), strict=True))


def _together(
    model: Callable[[], Any], kept: Any, subject: Any, profile: Profile, size: tuple[int, int]
) -> dict[str, Any]:
    """Table 5: chooser -> end -> change -> losses and divergences of windows."""
    load = profile.counts / profile.counts.sum(1, keepdims=True)
    ranked = scores({"load": load, "importance": profile.importance})
    chosen = {name: {"least": s.argmin(1), "most": s.argmax(1)} for name, s in ranked.items()}
    ids, domains = spread(subject.windows("rest"), *size)
    benches: list[Bench] = []

    def one(experts: npt.NDArray[Any], change: str) -> Arrays:
        if not benches:
            benches.append(Bench(model(), ids))
        with changed(model(), dict(enumerate(experts.tolist())), change):
            effect = benches[0].effect()
        return {"divergence": effect.divergence, "rise": effect.rise, "before": benches[0].losses}

    rows = []
    for name, ends in chosen.items():
        for end, experts in ends.items():
            for change in CHANGES:
                # Kept by its experts, so that choosers who agree share a measurement.
                arrays = kept(
                    f"all layers, {change}",
                    lambda experts=experts, change=change: one(experts, change),
                    "together",
                    experts=experts.tolist(),
                )
                rows.append({"by": name, "end": end, "change": change, **{k: v.tolist() for k, v in arrays.items()}})
    return {"tokens": int(ids.numel()), "domains": list(domains), "rows": rows}


def section(values: dict[str, Any], folder: Path, quick: bool) -> Section:
    """Text, tables and pictures.

    Args:
        values: of `measure`.
        folder: where pictures go.
        quick: whether the values are of the small form.
    """
    load, truth = folder / "importance-load.png", folder / "importance-truth.png"
    draw_load(values, load)
    draw_truth(values, scores(values), truth)
    found = importance_words.agreements(values, scores(values))
    parts = [
        importance_words.load_text(values),
        picture(load, "Load against importance of every expert"),
        importance_words.truth_text(values, found, quick),
        picture(truth, "True divergence of changing one expert against what predicts it"),
        importance_words.together_text(values, CHOOSERS),
    ]
    return Section("Load is not importance, and what importance is", "\n\n".join(parts) + "\n")
