"""Files and directories that appear whole or not at all.

Everything is written under a temporary name beside the destination (same file system), synced, and renamed.
A process killed at any point leaves the destination absent (or as it was) or complete; what it leaves behind
is named `.<name>.<pid>.partial` and is swept away by the next write to the same destination. A directory that
was about to be replaced is `.<name>.<pid>.replaced` for a moment; if its process was killed in that moment, the
next write first puts it back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from equipoise.errors import InputError


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _sweep(path: Path) -> None:
    """Clear up after killed writers of the same destination; a live writer's work is not touched."""
    # The whole name must match: `run` does not own what belongs to `run.json`, nor is its name a pattern.
    ours = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.(partial|replaced)")
    for left in sorted(path.parent.iterdir()):
        match = ours.fullmatch(left.name)
        if match is None or (int(match[1]) != os.getpid() and _alive(int(match[1]))):
            continue
        if match[2] == "replaced" and not path.exists():
            os.rename(left, path)
        else:
            _remove(left)


def _remove(path: Path) -> None:
    """Remove a file, a link, or a directory with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def require_destination(path: Path, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse a destination that exists (unless `force`) or cannot be written, before expensive work.

    Clears up after killed writers first.

    Args:
        path: file or directory to be written.
        force: it may exist, and will be replaced.
        inputs: what is read; replacing the destination must not destroy it.

    Raises:
        InputError: it has no name of its own, it exists, its parent is not a writable directory, or it is or holds
            an input.
    """
    if path.name in ("", ".."):
        raise InputError(f"{path} is no name for something new: give --out NAME")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{path} cannot be written: {parent} is not a directory this user may write to")
    try:
        os.lstat(_partial(path))
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{path} cannot be written: the name is too long") from None
        raise
    if parent == path.absolute().parent:
        _sweep(path)  # may put back what a killed writer had moved aside
    if os.path.lexists(path) and not force:
        raise InputError(f"{path} exists already: give another --out, or --force to replace it")
    for read in inputs:
        if read.resolve().is_relative_to(path.resolve()):
            raise InputError(f"{path} cannot be replaced: {read}, which is read, would be lost; give another --out")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it replaces `path` in one rename, on error it is removed.

    Raises:
        InputError: `path` is a directory.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a directory: give the name of a file")
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

    With `force` an existing destination is moved aside, the new one moved in, and only then the old one removed.
    Killed in between, the destination is absent and the next write to it puts the old one back first.

    Raises:
        InputError: the destination exists and `force` is not set.
    """
    path = Path(path)
    require_destination(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.mkdir()
    try:
        yield partial
        for file in sorted(partial.rglob("*")):
            _sync(file)
        _sync(partial)
        if os.path.lexists(path):
            if not force:
                raise InputError(f"{path} has come into being meanwhile: give another --out, or --force to replace it")
            old = path.with_name(f".{path.name}.{os.getpid()}.replaced")
            os.rename(path, old)
            try:
                os.rename(partial, path)
            except BaseException:
                os.rename(old, path)
                raise
            _remove(old)
        else:
            os.rename(partial, path)
        _sync(path.parent)
    finally:
        if partial.exists():
            shutil.rmtree(partial)
