"""`profile`: load on all calibration batches, importance on some of the text, spread over it.

Counting costs a few per cent of a forward, and only the base model runs: no logits are needed. Importance computes
experts again and runs the model backwards, so it is measured on about `importance_tokens` tokens; of these,
`layer_tokens` go through the model once more for each layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from equipoise.errors import InputError
from equipoise.models.families import MoELayer, find_layers
from equipoise.options import ProfileOptions
from equipoise.profiling.importance import ImportanceMeter, low_precision, shared_out
from equipoise.profiling.lowered import lowered_divergence
from equipoise.profiling.sampling import Batch, spread_out
from equipoise.profiling.sensitivity import Backward
from equipoise.profiling.watching import watch
from equipoise.progress import Track, quietly
from equipoise.runtime.install import plan_of
from equipoise.runtime.sizes import slot_bytes
from equipoise.types import IntArray, Precision, Profile


@torch.no_grad()
def profile(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    options: ProfileOptions | None = None,
    *,
    track: Track = quietly,
    model_name: str | None = None,
    data: str = "",
) -> Profile:
    """Measure load and importance of every routed expert.

    Args:
        model: the original model, in evaluation mode.
        batches: dicts with `input_ids` and `attention_mask` [B, Q] (and `decoder_input_ids` where there is a decoder).
        options: how many windows and importance tokens to keep.
        track: progress.
        model_name: written into the profile; the config's name otherwise.
        data: what the batches are, written into the profile.

    Raises:
        InputError: no batch, no token, an unsupported family, or a model that has a plan already.
    """
    options = options or ProfileOptions()
    if plan_of(model) is not None:
        raise InputError("the model is balanced already; profile the original")
    layers = find_layers(model)
    items = list(batches)
    if not items:
        raise InputError("there is no batch to profile on")
    for number, batch in enumerate(items):
        for key in ("input_ids", "attention_mask"):
            if key not in batch:
                raise InputError(f"batch {number} has no {key!r}: give input_ids and attention_mask [B, Q]")
    if not any(bool(batch["attention_mask"].any()) for batch in items):
        raise InputError("there is no token in the calibration data: it is all padding")
    dtype = layers[0].layout.dtype
    low = options.low_precision or low_precision(dtype)
    sampled = spread_out(items, options.importance_tokens)
    # First, as it is what a model may refuse.
    importance, kind = _importance(model, layers, sampled, low, options, track) if sampled else ({}, {})
    steps = []
    before = np.zeros((len(layers), layers[0].num_experts), dtype=np.int64)
    runner = _runner(model, [layer.name for layer in layers])
    with watch(model) as load:
        for batch in track(items, len(items), "counting load"):
            runner(**_inputs(model, batch))
            now = load.counts
            steps.append(now - before)
            before = now
        top_k = load.top_k
    if not before.any():
        raise InputError("no token of the calibration data reached a routed expert")
    return Profile(
        counts=before,
        layer_ids=np.array([layer.layer_id for layer in layers]),
        layer_names=tuple(layer.name for layer in layers),
        series=_windows(np.stack(steps), options.windows),
        importance=importance,
        expert_bytes={
            precision: np.array([[slot_bytes(layer.layout, precision)] * layer.num_experts for layer in layers])
            for precision in dict.fromkeys(("original", "int8", low))
        },
        meta={
            "model": model_name or model.config.name_or_path or type(model).__name__,
            "model_type": model.config.model_type,
            "top_k": top_k,
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": int(sum(int(batch["attention_mask"].sum()) for batch in items)),
            "data": data,
            "importance_tokens": int(sum(int(batch["attention_mask"].sum()) for batch in sampled)),
            "low_precision": low,
            **kind,
            "created_by": _created_by(),
        },
    )


def _importance(
    model: PreTrainedModel,
    layers: list[MoELayer],
    batches: list[Batch],
    low: Precision,
    options: ProfileOptions,
    track: Track,
) -> tuple[dict[str, npt.NDArray[np.float32]], dict[str, str]]:
    """Importance by name, and what `error` is, for the profile's meta."""
    meter = ImportanceMeter(layers, low)
    if not options.sensitivity:
        with watch(model, meter.observe):
            for batch in track(batches, len(batches), "measuring importance"):
                model(**_inputs(model, batch))
        return meter.results(), {"error": "output"}
    backward = Backward(model, meter.observe)
    with watch(model, backward.observe), backward.attached(layers):
        for batch in track(batches, len(batches), "measuring importance"):
            backward.run(_inputs(model, batch))
    found = meter.results(backward.tokens)
    if not options.layer_tokens:
        return found, {"error": "gradients"}
    inputs = [_inputs(model, batch) for batch in spread_out(batches, options.layer_tokens)]
    found["error"] = shared_out(lowered_divergence(model, layers, inputs, low, track=track), found["error"])
    return found, {"error": "layers"}


def _created_by() -> str:
    from equipoise import __version__

    return f"equipoise {__version__}"


def _windows(steps: IntArray, most: int) -> IntArray:
    """Steps [n, L, E] summed into at most `most` windows of adjacent steps."""
    edges = np.unique(np.linspace(0, len(steps), min(most, len(steps)), endpoint=False).astype(int))
    return np.add.reduceat(steps, edges, axis=0)


def _runner(model: PreTrainedModel, names: list[str]) -> Any:
    """The base model when all MoE layers are inside it (its head is not needed), else the model."""
    prefix = model.base_model_prefix
    inside = prefix and hasattr(model, prefix) and all(name.startswith(f"{prefix}.") for name in names)
    return getattr(model, prefix) if inside else model


def _inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    keep = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    inputs: dict[str, Any] = {k: batch[k].to(model.device) for k in keep if k in batch}
    if not model.config.is_encoder_decoder:
        inputs["use_cache"] = False
    return inputs
