"""Scripts of benchmarks/paper about importance and generation, imported without leaving their plain names behind."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

FOLDER = Path(__file__).parents[2] / "benchmarks" / "paper"


def import_scripts(*names: str) -> SimpleNamespace:
    known = {path.stem for path in FOLDER.glob("*.py")}
    before = {name: sys.modules.pop(name, None) for name in known}
    sys.path.insert(0, str(FOLDER))
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(FOLDER))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
