"""SGLang's expert distribution recorder: the `.pt` files of `/dump_expert_distribution_record`.

    stat       {"rank", "logical_count": [steps, L, E], "average_utilization_rate_over_window"}
    per_pass   {"records": [{"forward_pass_id", "rank", "gatherer_key", "global_physical_count": [L, P]}],
                "last_physical_to_logical_map": [L, P]}
    per_token  as per_pass, each record with "topk_ids_of_layer": [L, tokens, K], physical ids, -1 pads

L counts every hidden layer. `stat` is already summed over ranks and written by rank 0 alone; of the others every
rank writes a file, and records of one `forward_pass_id` are summed. `stat` comes out of a circular buffer whose
unused rows are zero: the order of time is recovered when there is a gap, and unknown when the buffer is full.
The map is the one at the time of the dump: record with rebalancing off. Where attention is tensor-parallel every
rank sees every token, so counts (and `tokens`) are the true ones times the ranks; balance does not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.errors import InputError
from equipoise.exchange import torch_file
from equipoise.exchange.base import ImportOptions, Track
from equipoise.exchange.counts import Counts, agree, bounded, describe
from equipoise.types import IntArray

MAP = "last_physical_to_logical_map"


@dataclass
class _Pass:
    """One forward pass: counts [L, E] over all ranks, and each rank's ids [tokens, L, K] if they were recorded."""

    counts: IntArray
    ids: dict[int, list[IntArray]]


def read(paths: Sequence[Path], options: ImportOptions, track: Track) -> Counts:
    """The counts in one recording's files (a directory stands for the `.pt` files in it).

    Raises:
        InputError: not dumps of the recorder, not of one recording, or unsafe to load.
    """
    files = [file for path in paths for file in (sorted(path.glob("*.pt")) if path.is_dir() else [path])]
    if not files:
        raise InputError(f"{paths[0]} holds no .pt files; dump_expert_distribution_record writes them")
    kinds: dict[str, str] = {}
    steps: list[IntArray] = []
    ordered = True
    passes: dict[int, _Pass] = {}
    seen: set[tuple[int, int, str]] = set()
    shapes: dict[str, tuple[int, int]] = {}
    maps: set[bytes] = set()
    for file in track(files, len(files), "reading"):
        try:
            document = torch_file.load(file)
            kind = _kind(document)
            agree("the kind of dump", kinds, file.name, kind)
            if kind == "stat":
                count, known = _in_order(_stat(document))
                agree("layers x experts", shapes, file.name, count.shape[1:])
                ordered &= known
                steps.append(count)
            else:
                table = _table(document)
                agree("layers x experts", shapes, file.name, (len(table), int(table.max()) + 1))
                maps.add(table.tobytes())
                for record in _records(document):
                    _add(record, table, passes, seen)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error.__cause__
    notes = []
    if len(maps) > 1:
        notes.append(f"{MAP} differs between files: experts were moved while recording; record with rebalancing off")
    if kind == "stat":
        if not ordered or len(files) > 1:
            notes.append("steps may not be in order of time: a full circular buffer does not say where it starts")
        return Counts(
            np.concatenate(steps),
            range(shapes[files[0].name][0]),
            f"stat {describe(files)}",
            ordered=ordered and len(files) == 1,
            notes=notes,
        )
    order = sorted(passes)
    if not order:
        raise InputError(f"{describe(files)}: no forward pass is recorded")
    layers = shapes[files[0].name][0]
    return Counts(
        np.stack([passes[n].counts for n in order]),
        range(layers),
        f"{kind} {describe(files)}",
        topk_ids=_tokens([passes[n] for n in order], layers) if kind == "per_token" else None,
        notes=notes,
    )


def _kind(document: Any) -> str:
    """Stat, per_pass or per_token."""
    if isinstance(document, Mapping):
        if "logical_count" in document:
            return "stat"
        if "records" in document and MAP in document:
            first = next(iter(_records(document)), {})
            return "per_token" if "topk_ids_of_layer" in first else "per_pass"
    keys = ", ".join(map(str, document)) if isinstance(document, Mapping) else type(document).__name__
    raise InputError(f"it is not a dump of SGLang's expert distribution recorder (it holds {keys[:200] or 'nothing'})")


def _stat(document: Mapping[str, Any]) -> IntArray:
    """int64 [steps, L, E] of a stat dump."""
    count = torch_file.integers(document["logical_count"], "logical_count", 2, 3)
    return bounded(count if count.ndim == 3 else count[None], "logical_count")


def _in_order(count: IntArray) -> tuple[IntArray, bool]:
    """Turn a circular buffer so that its oldest row comes first.

    Args:
        count: [steps, L, E]; unused rows are zero.

    Returns:
        The rows (rotated when the unused ones form one gap), and whether the order is now that of time.
    """
    used = count.any(axis=(1, 2))
    starts = np.flatnonzero(used & ~np.roll(used, 1))
    return (np.roll(count, -int(starts[0]), axis=0), True) if len(starts) == 1 else (count, False)


def _table(document: Mapping[str, Any]) -> IntArray:
    """int64 [L, P] of a detail dump: the logical expert of each physical one."""
    table = torch_file.integers(document[MAP], MAP, 2)
    if not table.size:
        raise InputError(f"{MAP} is empty")
    if table.min() < 0 or table.max() >= table.shape[1]:
        raise InputError(f"{MAP} names an expert outside 0..{table.shape[1] - 1} (more experts than slots)")
    return table


def _records(document: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    records = document["records"]
    if not isinstance(records, (list, tuple)) or not all(isinstance(r, Mapping) for r in records):
        raise InputError("records is not a list of dictionaries")
    return records


def _add(record: Mapping[str, Any], table: IntArray, passes: dict[int, _Pass], seen: set[tuple[int, int, str]]) -> None:
    """Add a record to its forward pass, in logical experts."""
    number, rank, key = (record.get(name) for name in ("forward_pass_id", "rank", "gatherer_key"))
    if not isinstance(number, int) or not isinstance(rank, int) or not isinstance(key, str):
        raise InputError("a record lacks forward_pass_id, rank or gatherer_key")
    where = f"forward pass {number} of rank {rank}"
    if (number, rank, key) in seen:
        raise InputError(f"{where} is recorded twice: a file given twice, or dumps of two server runs")
    seen.add((number, rank, key))
    layers, slots = table.shape
    experts = int(table.max()) + 1
    count = torch_file.integers(record.get("global_physical_count"), f"{where}: global_physical_count", 2)
    if count.shape != table.shape:
        raise InputError(f"{where}: global_physical_count is {count.shape}, {MAP} is {table.shape}")
    one = passes.setdefault(number, _Pass(np.zeros((layers, experts), dtype=np.int64), {}))
    np.add.at(one.counts, (np.arange(layers)[:, None], table), bounded(count, f"{where}: global_physical_count"))
    if "topk_ids_of_layer" not in record:
        return
    ids = torch_file.integers(record["topk_ids_of_layer"], f"{where}: topk_ids_of_layer", 3)
    if ids.shape[0] != layers or (ids.size and (ids.min() < -1 or ids.max() >= slots)):
        raise InputError(f"{where}: topk_ids_of_layer is {ids.shape} with ids outside -1..{slots - 1} or other layers")
    again = np.stack([np.bincount(row[row >= 0], minlength=slots) for row in ids.reshape(layers, -1)])
    if not np.array_equal(again, count):
        raise InputError(f"{where}: topk_ids_of_layer and global_physical_count disagree")
    logical = np.where(ids >= 0, table[np.arange(layers)[:, None, None], ids], -1)
    one.ids.setdefault(rank, []).append(logical.transpose(1, 0, 2))


def _tokens(passes: Sequence[_Pass], layers: int) -> IntArray:
    """int64 [T, L, K] logical ids of all tokens, by pass and rank, -1 pads."""
    parts = [part for one in passes for rank in sorted(one.ids) for part in one.ids[rank]]
    width = max((part.shape[2] for part in parts), default=0)
    wide = [np.pad(p, ((0, 0), (0, 0), (0, width - p.shape[2])), constant_values=-1) for p in parts]
    return np.concatenate(wide) if wide else np.zeros((0, layers, 0), dtype=np.int64)
