"""Text as windows of one length, and windows as batches a model takes.

    text of a domain = [bos] document [eos] [bos] document [eos] ...      (bos where the tokenizer adds it)
    windows          = that row of tokens cut every `seq_len`

Every batch has the same shape (but for the number of rows of the last one): a new shape costs a CPU kernel
its set-up again. A domain's last partial window is dropped unless it is the only one; then it is padded
on the right. Windows never mix domains, so a loss or a load belongs to one domain.

An encoder-decoder model reads the first half of a window and writes the second by teacher forcing: the
decoder's input is its target shifted right behind `decoder_start_token_id`, as in T5.

N windows, B rows of a batch, W tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from equipoise.errors import InputError
from equipoise.files.text import TextRecord

if TYPE_CHECKING:
    from transformers import PretrainedConfig

IGNORED = -100
"""Label of a position that is not scored (the convention of torch and transformers)."""


@dataclass(frozen=True, eq=False)
class Window:
    """A stretch of one domain's tokens.

    Attributes:
        input_ids: int64 [W], at least 2 real tokens, no padding.
        domain: which text it is from.
    """

    input_ids: npt.NDArray[np.int64]
    domain: str


class Batch(dict[str, torch.Tensor]):
    """What `model(**batch)` takes; `domains` names the domain of each row.

    Decoder-only: `input_ids`, `attention_mask` [B, W].
    Encoder-decoder: `input_ids`, `attention_mask` [B, W // 2], and `decoder_input_ids`,
    `decoder_attention_mask`, `labels` [B, W - W // 2]; labels are -100 where padded.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], domains: tuple[str, ...]) -> None:
        super().__init__(tensors)
        self.domains = domains


def windows(tokenizer: Any, records: Iterable[TextRecord], seq_len: int) -> list[Window]:
    """Cut documents into windows of `seq_len` tokens, domain by domain.

    Args:
        tokenizer: a transformers tokenizer.
        records: documents; domains keep the order in which they first appear.
        seq_len: W, tokens a window, at least 2.

    Returns:
        N windows, each of `seq_len` tokens except the only window of a short domain.

    Raises:
        InputError: `seq_len` below 2, no documents, or a domain with fewer than 2 tokens.
    """
    if seq_len < 2:
        raise InputError(f"seq-len must be at least 2 (one token to read, one to predict), got {seq_len}")
    texts: dict[str, list[str]] = {}
    for record in records:
        texts.setdefault(record.domain, []).append(record.text)
    if not texts:
        raise InputError("fewer tokens than needed: there are no documents")
    head, tail = _separators(tokenizer)
    out: list[Window] = []
    for domain, documents in texts.items():
        # verbose=False: a document longer than the model's context is no cause for warning: it is cut below.
        encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
        row = np.concatenate([np.array([*head, *ids, *tail], dtype=np.int64) for ids in encoded])
        row = row[: len(row) - len(tail)]  # eos stands between documents, not after the last
        if len(row) < 2:
            raise InputError(
                f"fewer tokens than needed: domain {domain!r} has {len(row)}, one window needs at least 2; "
                "give more text"
            )
        full = len(row) // seq_len
        if full:
            out.extend(Window(row[i * seq_len : (i + 1) * seq_len], domain) for i in range(full))
        else:
            out.append(Window(row, domain))
    return out


def batches(windows: Sequence[Window], batch_size: int = 8, config: PretrainedConfig | None = None) -> list[Batch]:
    """Put windows into batches, in order.

    Args:
        windows: N of them.
        batch_size: B, rows of every batch but the last.
        config: the model's configuration: whether it is an encoder-decoder, its padding token, and limits to
            check against. None: decoder-only, padded with token 0.

    Returns:
        ceil(N / B) batches of int64 tensors on the CPU, all as wide as the longest window.

    Raises:
        InputError: a token is outside the model's vocabulary, or a window longer than its positions.
    """
    if batch_size < 1:
        raise InputError(f"batch-size must be at least 1, got {batch_size}")
    if not windows:
        raise InputError("fewer tokens than needed: there are no windows")
    width = max(len(window.input_ids) for window in windows)
    pad = _check(windows, width, config)
    chunks = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    if not getattr(config, "is_encoder_decoder", False):
        return [Batch(_padded([w.input_ids for w in rows], width, pad), _domains(rows)) for rows in chunks]
    start = getattr(config, "decoder_start_token_id", None)
    return [_encoder_decoder(rows, width, pad, pad if start is None else start) for rows in chunks]


def _separators(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens before and after a document: bos if the tokenizer adds it of itself, eos if it has one."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    with_special = tokenizer("a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    adds_bos = bos is not None and with_special[:1] == [bos] and without[:1] != [bos]
    return [bos] if adds_bos else [], [] if eos is None else [eos]


def _check(windows: Sequence[Window], width: int, config: PretrainedConfig | None) -> int:
    """The padding token, once the windows are known to fit the model."""
    if config is None:
        return 0
    text = config.get_text_config()
    top = max(int(window.input_ids.max()) for window in windows)
    vocabulary = getattr(text, "vocab_size", None)
    if vocabulary is not None and top >= vocabulary:
        raise InputError(
            f"the tokenizer gives token {top}, but the model's vocabulary ends at {vocabulary - 1}: "
            "they do not belong together"
        )
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and width > positions:
        raise InputError(f"windows of {width} tokens are longer than the model's {positions} positions")
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(text, name, None)
        if isinstance(token, int) and token >= 0:
            return token
    return 0


def _domains(rows: Sequence[Window]) -> tuple[str, ...]:
    return tuple(window.domain for window in rows)


def _padded(rows: Sequence[npt.NDArray[np.int64]], width: int, pad: int) -> dict[str, torch.Tensor]:
    """Rows padded on the right to [B, width], and the mask of what is real."""
    ids = np.full((len(rows), width), pad, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def _encoder_decoder(rows: Sequence[Window], width: int, pad: int, start: int) -> Batch:
    source = [w.input_ids[: len(w.input_ids) // 2] for w in rows]
    target = [w.input_ids[len(w.input_ids) // 2 :] for w in rows]
    half = width - width // 2
    encoder = _padded(source, width // 2, pad)
    shifted = _padded([np.concatenate([[start], row[:-1]]) for row in target], half, pad)
    # A target is as long as its shifted self, so one mask serves both.
    labels = _padded(target, half, IGNORED)["input_ids"]
    decoder = {"decoder_input_ids": shifted["input_ids"], "decoder_attention_mask": shifted["attention_mask"]}
    return Batch({**encoder, **decoder, "labels": labels}, _domains(rows))
