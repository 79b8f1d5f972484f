"""Profiles as `.npz` (numpy, `allow_pickle=False`). The published routing traces use the same keys.

Keys: `meta` (JSON string), `counts` int64 [L, E], `layer_ids` [L], `layer_names` [L], `series` [steps, L, E],
`topk_ids` [T, L, k], `importance_<name>` float32 [L, E], `expert_bytes_<precision>` int64 [L, E].
Everything is checked on reading: a wrong file is refused with one line, never half-used.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.errors import InputError
from equipoise.files.atomic import atomic_file
from equipoise.types import PRECISIONS, Profile

FORMAT = "equipoise-profile"
VERSION = 1
_LIMIT = 2**48
"""Above any real count or size, and low enough that the sum over all layers and experts fits int64."""
_IMPORTANCE = "importance_"
_BYTES = "expert_bytes_"


def _arrays(profile: Profile) -> dict[str, np.ndarray]:
    meta = {"format": FORMAT, "version": VERSION, **profile.meta}
    out: dict[str, np.ndarray] = {
        "meta": np.array(json.dumps(meta, sort_keys=True)),
        "counts": np.asarray(profile.counts, dtype=np.int64),
        "layer_ids": np.asarray(profile.layer_ids, dtype=np.int64),
    }
    if profile.layer_names:
        out["layer_names"] = np.array(profile.layer_names)
    if profile.series is not None:
        out["series"] = np.asarray(profile.series, dtype=np.int64)
    if profile.topk_ids is not None:
        out["topk_ids"] = np.asarray(profile.topk_ids)
    for name, values in sorted(profile.importance.items()):
        out[_IMPORTANCE + name] = np.asarray(values, dtype=np.float32)
    for name, sizes in sorted(profile.expert_bytes.items()):
        out[_BYTES + name] = np.asarray(sizes, dtype=np.int64)
    return out


def profile_hash(profile: Profile) -> str:
    """SHA-256 of the profile's contents (not of the compressed file, which differs between zlib versions)."""
    digest = hashlib.sha256()
    for name, array in sorted(_arrays(profile).items()):
        digest.update(f"{name}:{array.dtype.str}:{array.shape}:".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def save_profile(profile: Profile, path: Path) -> None:
    """Write a profile, whole or not at all."""
    with atomic_file(Path(path)) as partial, partial.open("wb") as handle:
        np.savez_compressed(handle, **_arrays(profile))  # type: ignore[arg-type]


def load_profile(path: Path) -> Profile:
    """Read and check a profile or a trace.

    Raises:
        InputError: the file is missing, not an npz, holds pickled arrays, or its arrays do not fit together.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such profile: {path}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            data = {name: archive[name] for name in archive.files}
    except (
        ValueError,
        OSError,
        EOFError,
        zipfile.BadZipFile,
        KeyError,
        NotImplementedError,
        SyntaxError,
    ) as error:
        why = "it holds pickled arrays" if "pickle" in str(error).lower() else f"it is not a readable .npz ({error})"
        raise InputError(f"profile {path} is refused: {why}; write it with `equipoise profile`") from error
    except Exception as error:  # zlib.error, struct.error, UnicodeDecodeError: a damaged archive
        raise InputError(f"profile {path} is damaged ({type(error).__name__}: {error})") from error
    try:
        return check_profile(_from_arrays(data))
    except InputError as error:
        raise InputError(f"profile {path}: {error}") from None


def _from_arrays(data: dict[str, np.ndarray]) -> Profile:
    for name in ("meta", "counts"):
        if name not in data:
            raise InputError(f"key {name!r} is missing; write it with `equipoise profile`")
    try:
        meta: Any = json.loads(str(data["meta"]))
    except (ValueError, RecursionError) as error:  # not JSON, or a number of thousands of digits
        raise InputError(f"meta is not JSON ({error})") from error
    if not isinstance(meta, dict):
        raise InputError("meta is not a JSON object")
    if meta.get("format", FORMAT) != FORMAT:
        raise InputError(f"format is {meta['format']!r}, not {FORMAT!r}")
    if meta.get("version", VERSION) != VERSION:
        raise InputError(f"version {meta['version']!r} is not readable by this release (it reads {VERSION})")
    counts = data["counts"]
    layer_ids = data.get("layer_ids", np.arange(counts.shape[0] if counts.ndim else 0))
    return Profile(
        counts=counts,
        layer_ids=layer_ids,
        meta=meta,
        layer_names=tuple(str(n) for n in data["layer_names"].reshape(-1)) if "layer_names" in data else (),
        series=data.get("series"),
        topk_ids=data.get("topk_ids"),
        importance={k.removeprefix(_IMPORTANCE): v for k, v in data.items() if k.startswith(_IMPORTANCE)},
        expert_bytes={k.removeprefix(_BYTES): v for k, v in data.items() if k.startswith(_BYTES)},
    )


def check_profile(profile: Profile) -> Profile:
    """Check that the arrays fit together; return the profile with its canonical dtypes.

    Raises:
        InputError: naming the array and what is wrong with it.
    """
    counts = _whole(profile.counts, "counts", 2)
    layers, experts = counts.shape
    if layers < 1 or experts < 1:
        raise InputError(f"counts has shape {counts.shape}: at least one layer and one expert are needed")
    layer_ids = _whole(profile.layer_ids, "layer_ids", 1)
    if len(layer_ids) != layers:
        raise InputError(f"layer_ids has {len(layer_ids)} entries for {layers} layers")
    if profile.layer_names and len(profile.layer_names) != layers:
        raise InputError(f"layer_names has {len(profile.layer_names)} entries for {layers} layers")
    names = profile.layer_names or ("",) * layers
    if len(set(zip(layer_ids.tolist(), names, strict=True))) < layers:
        raise InputError("layer_ids and layer_names name a layer twice")
    series = None
    if profile.series is not None:
        series = _whole(profile.series, "series", 3)
        if series.shape[1:] != counts.shape:
            raise InputError(f"series has shape {series.shape}, which does not fit counts {counts.shape}")
        if not np.array_equal(series.sum(0), counts):
            raise InputError("series does not add up to counts")
    topk_ids = profile.topk_ids
    if topk_ids is not None:
        if topk_ids.ndim != 3 or topk_ids.shape[1] != layers or topk_ids.dtype.kind not in "iu":
            raise InputError(
                f"topk_ids is {topk_ids.dtype} {topk_ids.shape}; integers [tokens, {layers}, k] are needed"
            )
        if topk_ids.size and (int(topk_ids.min()) < 0 or int(topk_ids.max()) >= experts):
            raise InputError(f"topk_ids holds an expert outside 0..{experts - 1}")
        ids = topk_ids.transpose(1, 0, 2).reshape(layers, -1)
        if not all(np.array_equal(np.bincount(row, minlength=experts), n) for row, n in zip(ids, counts, strict=True)):
            raise InputError("topk_ids do not add up to counts")
    importance = {}
    for name, values in profile.importance.items():
        if values.shape != counts.shape or values.dtype.kind not in "fiu":
            raise InputError(f"importance_{name} has shape {values.shape}, counts has {counts.shape}")
        if not np.isfinite(values).all():
            raise InputError(f"importance_{name} holds NaN or inf")
        if np.abs(values.astype(np.float64)).max() > np.finfo(np.float32).max:
            raise InputError(f"importance_{name} holds numbers beyond float32")
        importance[name] = values.astype(np.float32)
    sizes = {}
    for name, amounts in profile.expert_bytes.items():
        if name not in PRECISIONS:
            raise InputError(f"expert_bytes_{name}: precision {name!r} is not one of {', '.join(PRECISIONS)}")
        sizes[name] = _whole(amounts, f"expert_bytes_{name}", 2)
        if sizes[name].shape != counts.shape or (sizes[name] < 1).any():
            raise InputError(f"expert_bytes_{name} must be positive and of shape {counts.shape}")
    top_k = profile.meta.get("top_k")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or not 0 <= top_k <= experts):
        raise InputError(f"meta top_k is {top_k!r}, not a number from 0 to {experts}")
    return Profile(counts, layer_ids, profile.meta, profile.layer_names, series, topk_ids, importance, sizes)


def _whole(array: np.ndarray, name: str, ndim: int) -> np.ndarray:
    """The array as int64 [ndim axes], refused when negative, not whole, NaN, or of another rank."""
    if array.ndim != ndim:
        raise InputError(f"{name} has {array.ndim} axes, {ndim} are needed")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise InputError(f"{name} holds NaN or inf")
        if not np.array_equal(array, np.rint(array)):
            raise InputError(f"{name} holds numbers that are not whole")
    elif array.dtype.kind not in "iu":
        raise InputError(f"{name} has dtype {array.dtype}, integers are needed")
    if array.size and array.min() < 0:
        raise InputError(f"{name} holds negative numbers")
    if array.size and int(array.max()) >= _LIMIT:
        raise InputError(f"{name} holds numbers of {_LIMIT:,} and more")
    return array.astype(np.int64)
