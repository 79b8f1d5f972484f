"""What every engine shares: options, results, and the way from raw counts to a profile.

Shapes: L MoE layers, E logical experts of a layer, P physical experts (slots) of a layer, G ranks, T tokens,
k experts a token selects. `physical_to_logical` [L, P] is the object all engines agree on; rank r owns its
columns [r * P / G, (r + 1) * P / G).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

import equipoise
from equipoise.errors import InputError
from equipoise.exchange.placement import Placement
from equipoise.files.profile_npz import check_profile
from equipoise.types import IntArray, Profile

Rows = dict[int, list[int]]
"""Row index as the engine counts layers -> the logical expert of each of its P physical experts."""

Track = Callable[..., Iterator[Any]]
"""`track(items, total, what)` yields the same items and shows progress."""

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class ExportOptions:
    """How a plan is handed to an engine.

    Attributes:
        ep_size: expert-parallel size the engine will run with; must be the plan's number of ranks (None: it is).
        num_hidden_layers: layers of the model, dense ones included (None: up to the last MoE layer).
        placement_only: drop what the engine cannot honour (precision of a slot, unequal shares) and say so.
    """

    ep_size: int | None = None
    num_hidden_layers: int | None = None
    placement_only: bool = False

    def __post_init__(self) -> None:
        for name, value in (("ep-size", self.ep_size), ("num-hidden-layers", self.num_hidden_layers)):
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class ImportOptions:
    """How an engine's statistics become a profile.

    Attributes:
        windows: pool adjacent steps to at most this many load windows (0 = keep every step).
        top_k: experts a token selects, where the files do not say.
        num_experts: E, where the files do not say.
        model: name of the model, for the record.
        model_type: as in the model's config.json, for the record.
        dtype: of the model's expert weights, for the record.
    """

    windows: int = 0
    top_k: int | None = None
    num_experts: int | None = None
    model: str = ""
    model_type: str = ""
    dtype: str = ""

    def __post_init__(self) -> None:
        if self.windows < 0:
            raise InputError(f"windows must not be negative, got {self.windows}")
        for name, value in (("top-k", self.top_k), ("num-experts", self.num_experts)):
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        engine: its name.
        path: the file.
        rows: rows of the file (SGLang counts dense layers too).
        placement: what was handed over, and what was lost on the way.
        start: how to start the engine with the file.
        notes: lines a person should read.
    """

    engine: str
    path: Path
    rows: int
    placement: Placement
    start: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Imported:
    """A profile and the lines a person should read about it."""

    profile: Profile
    notes: tuple[str, ...] = ()


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


class Exporter(Protocol):
    """A module that writes an engine's placement file."""

    SUFFIXES: tuple[str, ...]

    def rows(self, placement: Placement, num_hidden_layers: int | None) -> Rows:
        """The file's rows by the engine's own layer index."""

    def render(self, rows: Rows, placement: Placement, suffix: str) -> bytes:
        """The file's bytes."""

    def parse(self, data: bytes, suffix: str) -> Rows:
        """The rows of a file; InputError when the engine would not read it."""

    def start(self, placement: Placement, path: Path) -> str:
        """How to start the engine with the file."""


class Importer(Protocol):
    """A module that reads an engine's statistics."""

    def read(self, paths: Sequence[Path], options: ImportOptions, track: Track) -> Counts:
        """The counts in the files; InputError when they are not the engine's statistics."""


def untracked(items: Iterable[Any], total: int | None, what: str) -> Iterator[Any]:
    """No progress shown."""
    yield from items


class Strict(BaseModel):
    """A file's schema: unknown keys and other types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


def validated(schema: type[Model], document: Any) -> Model:
    """The document as its schema.

    Raises:
        InputError: naming the key and what is wrong with it.
    """
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        kind = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        raise InputError(f"{where}: {kind}") from error


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
