"""Executing a plan: slots of mixed precision, and the transformers hooks that load and save them."""

from equipoise.runtime.application import apply
from equipoise.runtime.install import plan_of
from equipoise.runtime.sizes import expert_bytes, slot_bytes

__all__ = ["apply", "expert_bytes", "plan_of", "slot_bytes"]
