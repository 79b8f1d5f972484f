"""Giving freed memory back to the system.

glibc takes blocks above a threshold from the system and returns them when they are freed, but raises the threshold to
32 MiB as it sees such blocks freed; what is below stays with the process. A process that streams a checkpoint would
hold several layers' worth of nothing. So while it does, the threshold is kept low.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_M_MMAP_THRESHOLD = -3  # malloc.h
_LOW = 1 << 20
_HIGH = 32 << 20  # where glibc's own adjustment ends


@contextmanager
def frugal_memory() -> Iterator[None]:
    """Inside the block, on glibc, memory of a mebibyte and more goes back to the system when it is freed."""
    adjust = _glibc("mallopt")
    if adjust is not None:
        adjust(_M_MMAP_THRESHOLD, _LOW)
    try:
        yield
    finally:
        if adjust is not None:
            adjust(_M_MMAP_THRESHOLD, _HIGH)
        release()


def release() -> None:
    """On glibc, return the free pages of smaller blocks to the system too. Costs microseconds, unlike `gc.collect`."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> Any:
    """A function of glibc; None elsewhere (musl has neither, other systems need neither)."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
