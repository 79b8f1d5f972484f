"""Writing balanced checkpoints without ever loading the whole model."""

from equipoise.checkpoint.stream import apply_checkpoint

__all__ = ["apply_checkpoint"]
