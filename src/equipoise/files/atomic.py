"""Files and directories that appear whole or not at all.

Everything is written under a temporary name beside the destination (same file system), synced, and renamed.
A process killed at any point leaves the destination absent (or as it was) or complete; what it leaves behind
is named `.<name>.<pid>.partial` and is swept away by the next write to the same destination.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from equipoise.errors import InputError


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sweep(path: Path) -> None:
    """Remove what killed writers of the same destination left behind; a live writer's work is not touched."""
    for left in path.parent.glob(f".{path.name}.*.partial"):
        pid = left.name.split(".")[-2]
        if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def require_destination(path: Path, force: bool) -> None:
    """Refuse a destination that exists (unless `force`) or cannot be written, before expensive work.

    Raises:
        InputError: it exists, its parent is not a writable directory.
    """
    if path.exists() and not force:
        raise InputError(f"{path} exists already: give another --out, or --force to replace it")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{path} cannot be written: {parent} is not a directory this user may write to")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it replaces `path` in one rename, on error it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    partial = _partial(path)
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary directory to fill; on success it becomes `path`, on error it is removed.

    With `force` an existing destination is moved aside, the new one moved in, and only then the old one removed:
    killed in between, the destination is absent and the old one is kept under `.<name>.<pid>.partial`.

    Raises:
        InputError: the destination exists and `force` is not set.
    """
    path = Path(path)
    require_destination(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    partial = _partial(path)
    partial.mkdir()
    try:
        yield partial
        for file in sorted(partial.rglob("*")):
            _sync(file)
        _sync(partial)
        if path.exists():
            old = path.with_name(f".{path.name}.old.{os.getpid()}.partial")
            os.rename(path, old)
            os.rename(partial, path)
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        else:
            os.rename(partial, path)
        _sync(path.parent)
    finally:
        if partial.exists():
            shutil.rmtree(partial)
