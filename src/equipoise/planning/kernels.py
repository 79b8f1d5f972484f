"""How hot loops are compiled: numba, cached on disk, no fast-math (plans must be the same on every machine)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """Compile with numba on first use and keep the machine code beside the source (or in the user's cache)."""
    return cast(F, numba.njit(cache=True)(function))
