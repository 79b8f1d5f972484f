"""What every engine shares: options, results, what a module of an engine offers.

Shapes: L MoE layers, E logical experts of a layer, P physical experts (slots) of a layer, G ranks, T tokens,
k experts a token selects. `physical_to_logical` [L, P] is the object all engines agree on; rank r owns its
columns [r * P / G, (r + 1) * P / G).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from equipoise.errors import InputError
from equipoise.exchange.placement import Placement
from equipoise.types import Profile

if TYPE_CHECKING:
    from equipoise.exchange.counts import Counts

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
