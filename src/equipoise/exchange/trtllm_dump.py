"""TensorRT-LLM's expert statistics: the directory of `EXPERT_STATISTIC_PATH`.

    meta_info.json        {"num_experts": E, "num_experts_per_token": k, ...}
    rank{r}.safetensors   "{iteration}_{layer}" -> integers [E]

Counts are summed over ranks; each iteration of `EXPERT_STATISTIC_ITER_RANGE` is one step. Layers are the model's
own numbers, MoE layers only. `rank{r}_raw.safetensors` (the ids themselves) are not read. Where attention is
tensor-parallel every rank counts every token, so counts are the true ones times the ranks; balance does not change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from safetensors.numpy import load as load_safetensors

from equipoise.errors import InputError
from equipoise.exchange.base import ImportOptions, Track, validated
from equipoise.exchange.counts import Counts, bounded
from equipoise.types import IntArray

_RANK = re.compile(r"rank(\d+)\.safetensors")
_KEY = re.compile(r"(\d{1,15})_(\d{1,9})")


class _Meta(BaseModel):
    # Newer engines add keys (ep_size, experts_per_rank): these two are what is needed.
    model_config = ConfigDict(extra="ignore", strict=True)
    num_experts: Annotated[int, Field(ge=1)]
    num_experts_per_token: Annotated[int, Field(ge=1)]


def read(paths: Sequence[Path], options: ImportOptions, track: Track) -> Counts:
    """The counts in a statistics directory.

    Raises:
        InputError: not such a directory, a damaged file, or iterations that miss a layer.
    """
    if len(paths) != 1 or not paths[0].is_dir():
        raise InputError(f"{paths[0]}: give the one directory that EXPERT_STATISTIC_PATH named")
    directory = paths[0]
    meta = _meta(directory / "meta_info.json")
    files = {int(m[1]): f for f in sorted(directory.iterdir()) if (m := _RANK.fullmatch(f.name))}
    if not files:
        raise InputError(f"{directory} holds no rank<r>.safetensors")
    sums: dict[tuple[int, int], IntArray] = {}
    for rank in track(sorted(files), len(files), "reading"):
        try:
            _add(files[rank], meta.num_experts, sums)
        except InputError as error:
            raise InputError(f"{files[rank]}: {error}") from error.__cause__
    if not sums:
        raise InputError(f"{directory}: no iteration is recorded; EXPERT_STATISTIC_ITER_RANGE says which are")
    iterations, layers = (sorted(set(part)) for part in zip(*sums, strict=True))
    for iteration in iterations:
        for layer in layers:
            if (iteration, layer) not in sums:
                raise InputError(
                    f"{directory}: iteration {iteration} has no counts of layer {layer}: a rank is missing"
                )
    notes = []
    if gaps := sorted(set(range(max(files) + 1)) - set(files)):
        notes.append(f"no file of rank {', '.join(map(str, gaps))}: what those ranks counted is missing")
    return Counts(
        np.stack([np.stack([sums[i, layer] for layer in layers]) for i in iterations]),
        layers,
        f"{directory.name} ({len(files)} ranks, iterations {iterations[0]} to {iterations[-1]})",
        top_k=meta.num_experts_per_token,
        notes=notes,
    )


def _meta(path: Path) -> _Meta:
    try:
        meta = validated(_Meta, json.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: rank 0 writes it when the iteration range ends") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error if isinstance(error, InputError) else f'not JSON ({error})'}") from error
    if meta.num_experts_per_token > meta.num_experts:
        raise InputError(f"{path}: {meta.num_experts_per_token} experts a token, but {meta.num_experts} in all")
    return meta


def _add(path: Path, experts: int, sums: dict[tuple[int, int], IntArray]) -> None:
    """Add a rank's counts."""
    try:
        tensors = load_safetensors(path.read_bytes())
    except OSError as error:
        raise InputError(f"it cannot be read ({error.strerror})") from error
    except Exception as error:  # SafetensorError, and KeyError or TypeError for dtypes numpy lacks
        raise InputError(f"it is not a readable .safetensors file ({type(error).__name__}: {error})") from error
    for key, counts in tensors.items():
        match = _KEY.fullmatch(key)
        if not match:
            raise InputError(f"key {key!r} is not <iteration>_<layer>")
        if counts.shape != (experts,) or counts.dtype.kind not in "iu":
            raise InputError(f"{key} is {counts.dtype} {counts.shape}, integers ({experts},) are needed")
        where = (int(match[1]), int(match[2]))
        sums[where] = sums.get(where, np.zeros(experts, dtype=np.int64)) + bounded(counts, key)
