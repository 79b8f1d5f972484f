"""Cells: measurements that are kept under the hash of everything they depend on.

    key    = SHA-256 of (name, inputs, source of the modules that measure)        twelve digits
    file   = <work>/<name>-<key>.json      {"name", "inputs", "seconds", "machine", "value"}, or "error" for "value"
             <work>/<name>-<key>.npz       arrays

A run that was stopped goes on where it stood; a change of the model, the data, an option or the measuring code makes
a new key, and nothing else is measured again. What could not be run is a cell too: it says why, and is tried again
the next time. Several runs may share a directory: who comes to a cell that another run is measuring waits for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from equipoise.cli import console
from equipoise.errors import InputError
from equipoise.files.atomic import atomic_file


class Store:
    """The cells of one run.

    Args:
        work: directory that keeps them.
        fresh: measure anew what is there.
        machine: in words, written into what is measured.

    Attributes:
        only: names of cells, or what stands before a `/` in them; others are not measured, only read. Empty: all.
        closed: measure nothing at all.
        machines: seconds that the cells took, by the machine that measured them.
    """

    def __init__(self, work: Path, fresh: bool = False, machine: str = "") -> None:
        self.work = work
        self.fresh = fresh
        self.machine = machine
        self.only: tuple[str, ...] = ()
        self.closed = False
        self.machines: dict[str, float] = {}
        self.measured = self.read = 0
        self.failed: dict[str, str] = {}
        self.seconds = 0.0
        work.mkdir(parents=True, exist_ok=True)

    def cell(
        self,
        name: str,
        inputs: Mapping[str, Any],
        measure: Callable[[], Any],
        code: Sequence[ModuleType] = (),
    ) -> Any:
        """The value of a cell, measured when it is not kept.

        Args:
            name: of the cell, also of its file.
            inputs: what it depends on, plain values.
            measure: gives a plain value (dicts, lists, numbers, text).
            code: modules whose text belongs to the inputs.

        Returns:
            The value; None where it could not be measured (`failed` says why) or is not kept.
        """
        path = self.path(name, inputs, code, "json")
        asked = not self.only or any(name == one or name.startswith(f"{one}/") for one in self.only)
        if self.closed or not asked:
            return self._kept(path)
        with self.alone(path):
            value = None if self.fresh else self._kept(path)
            return self._measured(path, name, inputs, measure) if value is None else value

    def _kept(self, path: Path) -> Any:
        """The value in a file; None where there is none."""
        document = json.loads(path.read_text()) if path.exists() else {}
        if "value" in document:
            self.read += 1
            self._took(document)
        return document.get("value")

    def _took(self, document: Mapping[str, Any]) -> None:
        where = document.get("machine") or "a machine that was not noted"
        self.seconds += document["seconds"]
        self.machines[where] = self.machines.get(where, 0.0) + document["seconds"]

    def _measured(self, path: Path, name: str, inputs: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        console.note(f"measures {name}")
        began = time.perf_counter()
        document: dict[str, Any] = {"name": name, "inputs": inputs, "machine": self.machine}
        try:
            document["value"] = measure()
        except Exception as error:
            # Whatever it is, the other cells can still be measured.
            if not isinstance(error, InputError):
                traceback.print_exc()
            self.failed[name] = document["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            console.note(f"  {name} could not be run: {document['error']}")
        document["seconds"] = time.perf_counter() - began
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(console.plain(document), indent=1) + "\n")
        self.measured += 1
        self._took(document)
        # As it will be read: a value does not depend on whether it was measured or kept.
        return json.loads(path.read_text()).get("value")

    def arrays(
        self,
        name: str,
        inputs: Mapping[str, Any],
        measure: Callable[[], Mapping[str, npt.NDArray[Any]]],
        code: Sequence[ModuleType] = (),
    ) -> dict[str, npt.NDArray[Any]]:
        """As `cell`, for arrays; what goes wrong is raised, because cells are built on them."""
        path = self.path(name, inputs, code, "npz")

        def make() -> None:
            values = measure()
            with atomic_file(path) as partial, partial.open("wb") as stream:
                np.savez_compressed(stream, **values)  # type: ignore[arg-type]

        self.file(path, name, make)
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    def file(self, path: Path, name: str, make: Callable[[], None]) -> None:
        """Have a file of the run made that is not there, by one run at a time.

        Args:
            path: of `path`.
            name: of what is in it.
            make: writes it, atomically.

        Raises:
            InputError: it is not there, and the store is closed.
        """
        if self.closed and not path.exists():
            raise InputError(f"{self.work} does not hold {path.name}: measure first, with the same options")
        if self.closed:
            self.read += 1
            return
        with self.alone(path):
            if path.exists() and not self.fresh:
                self.read += 1
                return
            console.note(f"measures {name}")
            make()
            self.measured += 1

    @contextlib.contextmanager
    def alone(self, path: Path) -> Iterator[None]:
        """The only run that makes this file, inside the block; other runs wait. A run that dies lets go."""
        locks = self.work / "locks"
        locks.mkdir(exist_ok=True)
        with (locks / path.name).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def path(self, name: str, inputs: Mapping[str, Any], code: Sequence[ModuleType], suffix: str) -> Path:
        """File of a cell."""
        sources = [hashlib.sha256(inspect.getsource(module).encode()).hexdigest() for module in code]
        key = hashlib.sha256(json.dumps([name, console.plain(inputs), sources], sort_keys=True).encode()).hexdigest()
        return self.work / f"{name.replace('/', '_')}-{key[:12]}.{suffix}"


def fingerprint(directory: Path, pattern: str = "*.safetensors") -> str:
    """Twelve digits for a checkpoint's weights.

    Raises:
        InputError: the directory holds none.
    """
    files = sorted(directory.glob(pattern))
    if not files:
        raise InputError(f"{directory} holds no {pattern}: build the model first (see benchmarks/paper/README.md)")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:12]
