"""Equipoise keeps the experts of Mixture-of-Experts language models in balance at inference.

    import equipoise as eq
    profile = eq.profile(model, batches)      # load and importance on calibration text
    plan = eq.plan(profile, budget=1.0)       # replicas and precision under one byte budget
    eq.apply(model, plan)                     # in place
    with eq.watch(model) as load:
        model(**batch)
    eq.lis(load.counts)

Importing the package is cheap: torch and transformers load with the first name that needs them. It also
teaches transformers, as soon as that is imported, to read balanced checkpoints.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

__version__ = "0.1.0"

if TYPE_CHECKING:
    from equipoise.checkpoint import apply_checkpoint
    from equipoise.errors import InputError
    from equipoise.files import load_plan, load_profile, save_plan, save_profile
    from equipoise.gating import gate
    from equipoise.metrics import lis, max_over_mean, rank_load, slot_lis, slot_load
    from equipoise.planning import plan
    from equipoise.profiling import profile, watch
    from equipoise.rerouting import calibrate as calibrate_laser
    from equipoise.rerouting import laser, load_laser, save_laser
    from equipoise.runtime import apply
    from equipoise.runtime.balancer import StreamingBalancer
    from equipoise.telemetry import Telemetry
    from equipoise.types import LayerPlan, Plan, Profile, Slot

_WHERE = {
    "InputError": "errors",
    "LayerPlan": "types",
    "Plan": "types",
    "Profile": "types",
    "Slot": "types",
    "StreamingBalancer": "runtime.balancer",
    "Telemetry": "telemetry",
    "apply": "runtime",
    "apply_checkpoint": "checkpoint",
    "calibrate_laser": "rerouting",
    "gate": "gating",
    "laser": "rerouting",
    "lis": "metrics",
    "load_laser": "rerouting",
    "load_plan": "files",
    "load_profile": "files",
    "max_over_mean": "metrics",
    "plan": "planning",
    "profile": "profiling",
    "rank_load": "metrics",
    "save_laser": "rerouting",
    "save_plan": "files",
    "save_profile": "files",
    "slot_lis": "metrics",
    "slot_load": "metrics",
    "watch": "profiling",
}

_CALLED = {"calibrate_laser": "calibrate"}
"""Public names that their module knows by a shorter one."""

__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'equipoise' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"equipoise.{_WHERE[name]}"), _CALLED.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])


@wrapt.when_imported("transformers.modeling_utils")
def _register(_module: Any) -> None:
    """Register the experts implementation and the checkpoint format, now or when transformers is imported."""
    importlib.import_module("equipoise.runtime.registration")


importlib.import_module("equipoise.native.imports").watch()
