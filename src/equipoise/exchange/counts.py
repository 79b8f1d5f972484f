"""From the counts an importer found to a profile: what every engine's statistics have in common.

Shapes: L layers as the engine counts them (dense ones may be among them), E logical experts of a layer, T tokens,
k experts a token selects, K >= k columns of the engine's array of ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import equipoise
from equipoise.errors import InputError
from equipoise.exchange.base import Imported, ImportOptions
from equipoise.files.profile_npz import check_profile
from equipoise.types import IntArray, Profile


@dataclass
class Counts:
    """What an importer found, before it is a profile.

    Attributes:
        steps: int64 [steps, L, E] selections of logical experts.
        layer_ids: the engine's number of each layer, L of them.
        data: what was read, for `meta`.
        top_k: k if the files say.
        topk_ids: int [T, L, K] logical ids in order of time, -1 where a token has no selection.
        ordered: whether the steps are in order of time.
        notes: lines a person should read.
    """

    steps: IntArray
    layer_ids: Sequence[int]
    data: str
    top_k: int | None = None
    topk_ids: npt.NDArray[np.integer[Any]] | None = None
    ordered: bool = True
    notes: list[str] = field(default_factory=list)


def to_profile(engine: str, counts: Counts, options: ImportOptions) -> Imported:
    """Build the profile: empty steps and dense layers dropped, steps pooled, everything checked.

    Every token passes every MoE layer, so a layer without a single selection is a dense one (SGLang and vLLM
    count those too) and a step without any is an unused row of the engine's buffer.

    Raises:
        InputError: nothing was recorded, or the numbers do not fit together.
    """
    steps = counts.steps
    used = np.asarray(steps.any(axis=(1, 2)))
    moe = np.asarray(steps.any(axis=(0, 2)))
    if not used.any():
        raise InputError("no selection of any expert is recorded: record while requests are running")
    notes = list(counts.notes)
    if not moe.all():
        dense = [layer for layer, keep in zip(counts.layer_ids, moe, strict=True) if not keep]
        notes.append(f"layers without any load were left out as dense: {', '.join(map(str, dense))}")
    steps = steps[used][:, moe]
    top_k, topk_ids = counts.top_k, None
    if counts.topk_ids is not None:
        topk_ids, why = _complete(counts.topk_ids[:, moe])
        if topk_ids is None:
            notes.append(f"per-token ids are not kept ({why}); the counts are")
        elif top_k is None:
            top_k = topk_ids.shape[2]
    if options.top_k is not None and top_k is not None and options.top_k != top_k:
        raise InputError(f"--top-k {options.top_k} contradicts the files, which say {top_k}")
    top_k = top_k or options.top_k
    if top_k is None:
        notes.append("the files do not say how many experts a token selects; give --top-k to record it")
    total = steps.sum(0)
    meta: dict[str, Any] = {
        "model": options.model,
        "model_type": options.model_type,
        "top_k": top_k,
        "dtype": options.dtype,
        "tokens": int(total.sum(1).max()) // top_k if top_k else None,
        "data": f"{engine}: {counts.data}",
        "steps": len(steps),
        "steps_in_order": counts.ordered,
        "created_by": f"equipoise {equipoise.__version__} import",
    }
    profile = Profile(
        counts=total,
        layer_ids=np.array(counts.layer_ids, dtype=np.int64)[moe],
        meta=meta,
        series=pooled(steps, options.windows) if len(steps) > 1 else None,
        topk_ids=topk_ids,
    )
    return Imported(check_profile(profile), tuple(notes))


def pooled(steps: IntArray, windows: int) -> IntArray:
    """Sum adjacent steps into at most `windows` windows of nearly equal length (0 = as they are).

    Args:
        steps: [steps, L, E].
        windows: most windows to keep.
    """
    if windows == 0 or len(steps) <= windows:
        return steps
    starts = np.arange(windows) * len(steps) // windows
    return np.add.reduceat(steps, starts, axis=0)


def _complete(
    ids: npt.NDArray[np.integer[Any]],
) -> tuple[npt.NDArray[np.integer[Any]] | None, str]:
    """Ids [T, L, k] without pads, from [T, L, K] with -1 where a token selects nothing; or None and the reason."""
    valid = ids >= 0
    selected = valid.sum(-1)
    tokens = selected.any(1)
    sizes = np.unique(selected[tokens])
    if len(sizes) != 1:
        return None, "tokens select different numbers of experts"
    return ids[tokens][valid[tokens]].reshape(int(tokens.sum()), ids.shape[1], int(sizes[0])), ""


def describe(paths: Sequence[Path]) -> str:
    """The files by name, shortened when there are many."""
    names = [path.name for path in paths]
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} and {len(names) - 1} more files"


def agree(what: str, seen: dict[str, Any], name: str, value: Any) -> None:
    """Note the value of `name` in `seen` and refuse it if it differs from the first.

    Raises:
        InputError: two files differ.
    """
    first, known = next(iter(seen.items()), (name, value))
    seen.setdefault(name, value)
    if known != value:
        raise InputError(f"{what}: {value}, but {known} in {first}; import one run at a time")


def bounded(counts: npt.NDArray[np.integer[Any]], what: str) -> IntArray:
    """Counts as int64, none negative and none so large that a sum of them could wrap around.

    Raises:
        InputError: a count outside 0..2**48.
    """
    if counts.size and (int(counts.min()) < 0 or int(counts.max()) >= 2**48):
        raise InputError(f"{what} holds counts outside 0..2**48")
    return counts.astype(np.int64)
