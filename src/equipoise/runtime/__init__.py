"""Executing a plan: slots of mixed precision, and the transformers hooks that load and save them."""

from equipoise.runtime.install import apply, expert_bytes, plan_of, slot_bytes

__all__ = ["apply", "expert_bytes", "plan_of", "slot_bytes"]
