"""When the families are registered: at the first moment at which transformers can bear it.

The configurations are subclasses of Llama's, and transformers imports the modules of Auto classes and of Llama's
configuration in the middle of each other, in an order that depends on what a program imports first. Whichever of
them is finished last registers.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import wrapt

_CONFIGS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"
_LLAMA = "transformers.models.llama.configuration_llama"

_finished: set[str] = set()


def watch() -> None:
    """Register the families as soon as `AutoConfig` is imported, or now."""
    for name in (_CONFIGS, _MODELS, _LLAMA):
        wrapt.register_post_import_hook(_finish, name)


def _finish(module: Any) -> None:
    """A module is imported to its end."""
    done = "registered"
    _finished.add(module.__name__)
    if module.__name__ == _CONFIGS and _MODELS not in sys.modules:
        importlib.import_module(_MODELS)  # names only; it comes back here
    llama_in_the_middle = _LLAMA in sys.modules and _LLAMA not in _finished
    if _MODELS in _finished and not llama_in_the_middle and done not in _finished:
        _finished.add(done)  # before: registering imports, and comes back here
        importlib.import_module("equipoise.native").register()
