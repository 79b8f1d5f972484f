"""Which rows of the batch at hand are padding.

The experts see flattened rows [B * Q, H] and no mask. The mask is read where it still has its shape: at the
forward of the model, or of a stack inside it (in `generate`, an encoder is called on its own). Rows are
batch-major and, with a key-value cache, are the last Q columns of the mask.

`generate` goes on feeding its padding token to texts that have ended, with a mask of ones. So in a cached step of
one token a row, the padding token is padding too (where it is also the end token: from the second time on).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from equipoise.errors import InputError

_DECODER_IDS = {False: "input_ids", True: "decoder_input_ids"}


def _special_tokens(model: PreTrainedModel) -> tuple[int | None, list[int]]:
    """The token `generate` pads with by default, and those that end a text."""
    config: Any = getattr(model, "generation_config", None) or model.config.get_text_config(decoder=True)
    end = config.eos_token_id
    ends = [end] if isinstance(end, int) else list(end or [])
    pad = config.pad_token_id
    return (pad if pad is not None else next(iter(ends), None)), ends


class PaddingTracker:
    """The attention mask of the forward in flight, a stack per thread."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._local = threading.local()

    @property
    def _stack(self) -> list[Any]:
        try:
            return self._local.stack
        except AttributeError:
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
        if args:
            kwargs = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        mask = kwargs.get("attention_mask")
        plain = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        if not self._stack:
            self._local.running = self._running(kwargs)
        if self.model.config.is_encoder_decoder:
            # The outer mask is the encoder's. In a cached step of `generate` only the decoder runs, without one.
            if self._stack and mask is None:
                mask = self._local.running
        elif self._stack and plain is None:
            # An inner model gets a mask already prepared for attention, or none: the outer one's still holds.
            mask = self._stack[-1]
        elif plain is not None and self._local.running is not None:
            mask = torch.cat([plain[:, :-1], plain[:, -1:] * self._local.running.to(plain)], 1)
        self._stack.append(mask)
        self._local.known = {}

    def _running(self, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """Which texts have not ended, in a cached step of one token a row.

        Returns:
            bool [B, 1], or None when this is no such step, or all of them run.
        """
        both = self.model.config.is_encoder_decoder
        tokens, cache, mask = (kwargs.get(key) for key in (_DECODER_IDS[both], "past_key_values", "attention_mask"))
        started = False
        if cache is not None:
            # Caches without attention do not know their length; a decoder of an encoder-decoder has no mask.
            started = cache.get_seq_length() > 0 if both else mask is not None and mask.shape[-1] > 1
        if tokens is None or tokens.shape[1] != 1 or not started:
            self._local.ended = None
            return None
        pad, ends = _special_tokens(self.model)
        if pad is None:
            return None
        padding = tokens == pad
        if padding.is_cpu and not bool(padding.any()):
            return None  # as good as all True, and nothing to take from the mask
        if pad not in ends:
            return ~padding
        ended = getattr(self._local, "ended", None)
        if ended is None or ended.shape != padding.shape:
            ended = torch.zeros_like(padding)
        self._local.ended = ended | padding
        return ~(padding & ended)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._stack.pop()
        self._local.known = {}

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
        known: dict[int, torch.Tensor | None] = self._local.known  # every layer asks for the same
        if rows not in known:
            known[rows] = self._real_rows(mask, rows)
        return known[rows]

    def _real_rows(self, mask: Any, rows: int) -> torch.Tensor | None:
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
        real = mask[:, mask.shape[1] - length :].reshape(-1).bool()
        # A device is not waited for to spare the layers this.
        return None if real.is_cpu and bool(real.all()) else real
