"""How hot loops are compiled: numba, cached on disk, no fast-math (plans must be the same on every machine)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F, **options: Any) -> F:
    """Compile with numba on first use; the machine code is kept beside the source or in the user's cache.

    `options` are numba's. Where neither can be written (a read-only installation without a home), it is compiled anew
    in each process.
    """
    try:
        return cast(F, numba.njit(cache=True, **options)(function))
    except RuntimeError as error:
        if "cache" not in str(error):
            raise
        return cast(F, numba.njit(**options)(function))
