"""Scripts of a folder of benchmarks, imported without leaving their plain names (`data`, `model`) behind."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def import_scripts(folder: str, *names: str) -> SimpleNamespace:
    """Scripts by name (all of the folder without names); those they import come along."""
    known = [path.stem for path in (BENCHMARKS / folder).glob("*.py")]
    before = {name: sys.modules.pop(name, None) for name in known}
    sys.path.insert(0, str(BENCHMARKS / folder))
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in names or known})
    finally:
        sys.path.remove(str(BENCHMARKS / folder))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
