"""How library functions show progress without knowing a terminal: they take a `Track`.

`equipoise.cli.console.progress` gives one that draws bars; `quietly` shows nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """`track(items, total, what)` yields the same items; `total` is None when unknown."""

    def __call__(self, items: Iterable[T], total: int | None, what: str) -> Iterator[T]:
        """Yield the items and show how far along they are."""
        ...


def quietly(items: Iterable[T], total: int | None, what: str) -> Iterator[T]:
    """A `Track` that shows nothing."""
    yield from items
