"""The exchange room: plans out to serving engines, their statistics in as profiles.

Each engine is a module, named here and imported when it is asked for; only reading or writing SGLang's `.pt`
files needs torch, the rest needs numpy.

    export_plan(load_plan("plan.json"), "sglang", Path("map.json"), ExportOptions(placement_only=True))
    import_statistics([Path("expert_statistic")], "trtllm").profile
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from equipoise.errors import InputError
from equipoise.exchange.base import (
    Exported,
    Exporter,
    ExportOptions,
    Imported,
    Importer,
    ImportOptions,
    Track,
    untracked,
)
from equipoise.exchange.counts import to_profile
from equipoise.exchange.placement import Placement, check_placement, from_plan
from equipoise.files import atomic_file
from equipoise.types import Plan, Profile

EXPORTERS: Mapping[str, str] = {"sglang": "sglang", "trtllm": "trtllm", "vllm-ascend": "vllm_ascend"}
IMPORTERS: Mapping[str, str] = {"sglang": "sglang_dump", "trtllm": "trtllm_dump", "vllm": "vllm_dump"}
"""Engine -> module of this package, imported on first use."""

__all__ = [
    "EXPORTERS",
    "IMPORTERS",
    "ExportOptions",
    "Exported",
    "ImportOptions",
    "Imported",
    "Placement",
    "check_placement",
    "export_plan",
    "exporter",
    "from_plan",
    "import_statistics",
    "importer",
    "read_placement",
]


def _module(registry: Mapping[str, str], engine: str, what: str) -> Any:
    if engine not in registry:
        raise InputError(f"{what} {engine!r} is not known: choose from {', '.join(registry)}")
    return importlib.import_module(f"equipoise.exchange.{registry[engine]}")


def exporter(engine: str) -> Exporter:
    """The module that writes an engine's placement file.

    Raises:
        InputError: unknown name, with the choices.
    """
    module: Exporter = _module(EXPORTERS, engine, "engine to export to")
    return module


def importer(engine: str) -> Importer:
    """The module that reads an engine's statistics.

    Raises:
        InputError: unknown name, with the choices.
    """
    module: Importer = _module(IMPORTERS, engine, "engine to import from")
    return module


def check_suffix(engine: str, path: Path) -> str:
    """The path's suffix, if the engine takes it.

    Raises:
        InputError: the engine tells formats by suffix and does not know this one.
    """
    suffixes = exporter(engine).SUFFIXES
    if path.suffix not in suffixes:
        raise InputError(f"{path}: {engine} tells a file by its suffix, which must be {' or '.join(suffixes)}")
    return path.suffix


def export_plan(
    plan: Plan, engine: str, path: Path, options: ExportOptions | None = None, pad: Profile | None = None
) -> Exported:
    """Write a plan's placement for an engine, whole or not at all, and read it back before it is there.

    Args:
        plan: the plan; its slots are placed on ranks.
        engine: a name of `EXPORTERS`.
        path: the file to write; an existing one is replaced.
        options: how; None is the default.
        pad: loads of the same model, to fill ranks of unequal size by (None refuses them).

    Raises:
        InputError: the engine cannot honour the plan, with the reason, or does not take the path's suffix.
    """
    options = options or ExportOptions()
    module = exporter(engine)
    path = Path(path)
    suffix = check_suffix(engine, path)
    placement = from_plan(plan, engine, options.ep_size, options.placement_only, pad)
    last = max(placement.layer_ids)
    if options.num_hidden_layers is not None and options.num_hidden_layers <= last:
        raise InputError(f"--num-hidden-layers {options.num_hidden_layers}, but the plan has layer {last}")
    rows = module.rows(placement, options.num_hidden_layers)
    data = module.render(rows, placement, suffix)
    if module.parse(data, suffix) != rows:
        raise RuntimeError(f"the file for {engine} does not read back as it was written")
    with atomic_file(path) as partial:
        partial.write_bytes(data)
    return Exported(
        engine, path, len(rows), placement, module.start(placement, path), _losses(placement, options, engine, plan)
    )


def _losses(placement: Placement, options: ExportOptions, engine: str, plan: Plan) -> tuple[str, ...]:
    """What a person should know about the file."""
    notes = []
    if placement.lost_precisions:
        size = placement.slots / placement.num_experts
        notes.append(
            f"placement only: the lower precision of {placement.lost_precisions} slots is not in the file; {engine} "
            f"holds every slot at the precision it loads, {size:.3f} times the memory of the original experts"
        )
    if placement.lost_shares:
        notes.append(
            f"placement only: {engine} splits evenly, {placement.lost_shares} unequal shares are not in the file"
            f"{_cost_of_even(plan)}; `equipoise plan PROFILE --ranks {placement.ranks} --shares even` places for an "
            "even split"
        )
    if placement.added:
        notes.append(f"{placement.added} slots were added beyond the plan to make ranks equal; they take memory")
    if engine == "sglang" and options.num_hidden_layers is None:
        notes.append(
            f"rows for layers 0..{max(placement.layer_ids)}; give --num-hidden-layers if the model has more after them"
        )
    return tuple(notes)


def _cost_of_even(plan: Plan) -> str:
    """What the plan expects of its placement when shares are dropped, if it says so."""
    kept, dropped = (plan.predicted.get(f"rank_imbalance{end}") for end in ("", "_even"))
    if kept is None or dropped is None:
        return ""
    return f" (rank imbalance in sample {dropped:.3f} instead of {kept:.3f})"


def read_placement(engine: str, path: Path) -> dict[int, list[int]]:
    """Read an engine's placement file: row index as the engine counts -> logical expert of each slot.

    Raises:
        InputError: the file is missing or the engine would not read it.
    """
    path = Path(path)
    suffix = check_suffix(engine, path)
    try:
        return exporter(engine).parse(path.read_bytes(), suffix)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error.__cause__


def import_statistics(
    paths: Sequence[Path], engine: str, options: ImportOptions | None = None, track: Track = untracked
) -> Imported:
    """Read an engine's statistics as a profile.

    Args:
        paths: files, or a directory, as the engine wrote them.
        engine: a name of `IMPORTERS`.
        options: how; None is the default.
        track: shows progress.

    Raises:
        InputError: what is wrong, and in which file.
    """
    options = options or ImportOptions()
    module = importer(engine)
    paths = [Path(path) for path in paths]
    if not paths:
        raise InputError("no file to import")
    for path in paths:
        if not path.exists():
            raise InputError(f"no such file: {path}")
    if len({path.resolve() for path in paths}) != len(paths):
        raise InputError("a file is given twice: its counts would be added twice")
    return to_profile(engine, module.read(paths, options, track), options)
