"""What every command shares: tables, progress bars, the last JSON line.

Tables and the JSON line go to stdout, progress and notes to stderr.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from equipoise.progress import Track

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
_UNBOUND = out.options.update(width=10_000)

T = TypeVar("T")


@contextmanager
def progress() -> Iterator[Track]:
    """Progress bars on stderr for as long as the block runs; yields a `Track`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as bars:

        def track(items: Iterable[T], total: int | None, what: str) -> Iterator[T]:
            task = bars.add_task(what, total=total)
            count = 0
            for item in items:
                yield item
                count += 1
                bars.advance(task)
            bars.update(task, total=count, completed=count)

        yield track


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], footer: Sequence[object] = ()) -> None:
    """Print a table; every column but the first is right-aligned."""
    grid = Table(box=box.SIMPLE_HEAD, show_footer=bool(footer))
    for i, name in enumerate(columns):
        grid.add_column(name, justify="left" if i == 0 else "right", footer=str(footer[i]) if footer else "")
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    # The title is printed apart: inside, it would be wrapped to the width of a narrow table.
    out.print(title, markup=False)
    if out.is_terminal:
        out.print(grid)
    else:  # a pipe or a file has no edge at which cells would have to be folded
        Console(highlight=False, width=max(out.width, Measurement.get(out, _UNBOUND, grid).maximum)).print(grid)


def note(message: str) -> None:
    """A line for people on stderr."""
    err.print(message, markup=False)


def plain(value: Any) -> Any:
    """`value` with numpy scalars and arrays turned into plain JSON values; NaN and inf become null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def last_line(result: Mapping[str, Any]) -> None:
    """Print the command's result as one JSON object on one line: always the last line of stdout."""
    print(json.dumps(plain(result), allow_nan=False), flush=True)
