"""vLLM's `--enable-return-routed-experts`: completion responses saved as `.json` or `.jsonl`.

Each choice carries `routed_experts`, a base64 `.npy` of integers [tokens - 1, layers, k]: logical ids of all
hidden layers. Layers without experts and tokens that were not computed stay zero in the engine's buffer; as a
token never selects an expert twice, a layer of zeros only is a dense one (for k = 1 that is an assumption, and
said). The number of experts is not in the response: `--num-experts`. Each response is one step. Tokens served
from the prefix cache count in each response that returned them.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.errors import InputError
from equipoise.exchange.base import ImportOptions, Track
from equipoise.exchange.counts import Counts, agree, describe
from equipoise.types import IntArray


def read(paths: Sequence[Path], options: ImportOptions, track: Track) -> Counts:
    """The counts in saved responses.

    Raises:
        InputError: no `routed_experts` in them, damaged arrays, or `--num-experts` missing or too small.
    """
    experts = options.num_experts
    if experts is None:
        raise InputError("vLLM's responses do not say how many experts a layer has: give --num-experts E")
    parts: list[IntArray] = []
    sizes: list[int] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for path in track(paths, len(paths), "reading"):
        try:
            for number, response in _responses(path):
                found = [_decode(text, experts) for text in _texts(response)]
                for ids in found:
                    agree("layers x experts a token", shapes, f"{path.name}:{number}", ids.shape[1:])
                if found:
                    parts += found
                    sizes.append(sum(len(ids) for ids in found))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error.__cause__
    if not parts:
        raise InputError(f"{describe(paths)}: no choice has routed_experts; serve with --enable-return-routed-experts")
    ids = _marked(np.concatenate(parts))
    _, layers, top_k = ids.shape
    return Counts(
        np.stack([_counts(part, experts) for part in np.split(ids, np.cumsum(sizes)[:-1])]),
        range(layers),
        f"responses {describe(paths)}",
        top_k=top_k,
        topk_ids=ids,
        notes=["k is 1: a layer whose tokens all chose expert 0 counts as dense"] if top_k == 1 else [],
    )


def _responses(path: Path) -> Iterator[tuple[int, Any]]:
    """The JSON documents of a file, one in all or one a line, each with the number of its line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"it cannot be read as text ({error})") from error
    lines = list(enumerate(text.splitlines(), 1)) if path.suffix == ".jsonl" else [(1, text)]
    for number, line in lines:
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"line {number} is not JSON ({error})") from error


def _texts(response: Any) -> list[str]:
    """The base64 strings of a response's choices."""
    choices = response.get("choices") if isinstance(response, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise InputError("a response without a list of choices; save the whole completion response")
    found = [choice["routed_experts"] for choice in choices if choice.get("routed_experts") is not None]
    if not all(isinstance(text, str) for text in found):
        raise InputError("routed_experts is not a base64 string; this release reads the format of vLLM 0.32")
    return found


def _decode(text: str, experts: int) -> IntArray:
    """int64 [tokens, layers, k] of one choice, ids below `experts`."""
    try:
        raw = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
    except binascii.Error as error:
        raise InputError(f"routed_experts is not base64 ({error})") from error
    except Exception as error:  # numpy's header parser raises many types on damaged bytes
        why = "it holds pickled objects" if "pickle" in str(error).lower() else f"{type(error).__name__}: {error}"
        raise InputError(f"routed_experts is not a .npy of integers ({why})") from error
    if not isinstance(raw, np.ndarray) or raw.ndim != 3 or raw.dtype.kind not in "iu" or 0 in raw.shape[1:]:
        raise InputError("routed_experts is not an array of integers [tokens, layers, k]")
    if raw.size and (int(raw.min()) < 0 or int(raw.max()) >= experts):
        raise InputError(f"routed_experts holds experts outside 0..{experts - 1}: see --num-experts")
    return raw.astype(np.int64)


def _marked(ids: IntArray) -> IntArray:
    """The ids [T, L, k] with -1 where the engine's buffer was never written (zeros)."""
    written = ids.any(axis=2, keepdims=True)  # two distinct experts are never both 0
    if ids.shape[2] == 1:
        written = ids.any(axis=(0, 2), keepdims=True) & ids.any(axis=(1, 2), keepdims=True)
    return np.where(written, ids, -1)


def _counts(ids: IntArray, experts: int) -> IntArray:
    """int64 [L, E] selections in ids [T, L, k], -1 ignored."""
    layers = ids.transpose(1, 0, 2).reshape(ids.shape[1], -1)
    return np.stack([np.bincount(row[row >= 0], minlength=experts) for row in layers]).astype(np.int64)
