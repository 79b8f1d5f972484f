"""Which rows of the batch at hand are padding.

The experts see flattened rows [B * Q, H] and no mask. The mask is read where it still has its shape: at the
forward of the model, or of a stack inside it (in `generate`, an encoder is called on its own). Rows are
batch-major and, with a key-value cache, are the last Q columns of the mask.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from equipoise.errors import InputError


class PaddingTracker:
    """The attention mask of the forward in flight, a stack per thread."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._local = threading.local()

    @property
    def _stack(self) -> list[Any]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    @contextmanager
    def tracking(self) -> Iterator[PaddingTracker]:
        """Follow the masks of every forward inside the block."""
        with ExitStack() as hooks:
            for module in self.model.modules():
                if isinstance(module, PreTrainedModel):
                    enter = module.register_forward_pre_hook(self._enter, with_kwargs=True)
                    leave = module.register_forward_hook(self._leave, always_call=True)
                    hooks.callback(enter.remove)
                    hooks.callback(leave.remove)
            yield self

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is None and args:
            bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
            mask = bound.arguments.get("attention_mask")
        is_plain = isinstance(mask, torch.Tensor) and mask.ndim == 2
        if not is_plain and self._stack and not self.model.config.is_encoder_decoder:
            # An inner model gets a mask already prepared for attention, or none: the outer one's still holds.
            mask = self._stack[-1]
        self._stack.append(mask)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._stack.pop()

    def real_rows(self, rows: int) -> torch.Tensor | None:
        """Which of the rows at hand are tokens of the text.

        Args:
            rows: B * Q.

        Returns:
            bool [rows], or None when all are.

        Raises:
            InputError: the forward was given a mask from which padding cannot be told.
        """
        mask = self._stack[-1] if self._stack else None
        if mask is None:
            return None
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            raise InputError(
                "padding cannot be told from this attention mask (a static cache prepares it in 4 axes): "
                "pass the [batch, length] mask and use the dynamic cache while watching"
            )
        batch = mask.shape[0]
        length = rows // batch
        if rows % batch or length > mask.shape[1]:
            raise InputError(
                f"the experts got {rows} rows, which does not fit an attention mask of shape {tuple(mask.shape)}"
            )
        return mask[:, mask.shape[1] - length :].reshape(-1).bool()
