"""Greedy text of many prompts at once: a beginning that all share is read once, prompts are padded on the left.

    [ beginning ][ padding, masked ][ prompt ][ new tokens ]

Rows of like length go together. A row ends at the end token, at a stop text, or after `most` tokens; a batch when all
its rows have ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache


def until(text: str, stops: Sequence[str]) -> str:
    """What comes before the first of the stop texts."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


@torch.inference_mode()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], stops: Sequence[str], most: int, beginning: str = "",
    batch: int = 64,
) -> list[str]:  # fmt: skip
    """Answers, each the most likely token after token, without what stops it.

    Args:
        model: decoder-only.
        tokenizer: its tokenizer.
        prompts: what follows the beginning, each at least one token.
        stops: texts that end an answer.
        most: new tokens of an answer.
        beginning: of every prompt; its tokens are its own, so a prompt must not begin inside a word.
        batch: rows a forward.
    """
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    shared = tokenizer(beginning)["input_ids"] if beginning else []
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out = [""] * len(rows)
    for start in range(0, len(order), batch):
        mine = order[start : start + batch]
        answers = _answers(model, tokenizer, [rows[i] for i in mine], shared, stops, most)
        for i, answer in zip(mine, answers, strict=True):
            out[i] = answer
    return out


def _answers(
    model: Any, tokenizer: Any, rows: Sequence[list[int]], shared: list[int], stops: Sequence[str], most: int
) -> list[str]:
    end = tokenizer.eos_token_id
    width = max(map(len, rows))
    device = model.device
    ids = torch.tensor([[end] * (width - len(row)) + row for row in rows], device=device)
    real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    mask = torch.cat([torch.ones(len(rows), len(shared), dtype=torch.int64, device=device), real], 1)
    cache = DynamicCache(config=model.config)
    if shared:
        begun = torch.tensor([shared], device=device)
        model(input_ids=begun, attention_mask=torch.ones_like(begun), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(rows))
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, len(shared) :]
    written: list[list[int]] = [[] for _ in rows]
    texts: list[str | None] = [None] * len(rows)
    for _ in range(most):
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
        following = logits.argmax(-1)
        for i, token in enumerate(following.tolist()):
            if texts[i] is not None:
                continue
            if token != end:
                written[i].append(token)
            text = tokenizer.decode(written[i], skip_special_tokens=True)
            if token == end or any(stop in text for stop in stops):
                texts[i] = until(text, stops)
        going = torch.tensor([text is None for text in texts], device=device)
        if not going.any():
            break
        # What has ended goes on as padding: it must not count as load, which LASER looks at.
        ids = torch.where(going, following, end)[:, None]
        mask = torch.cat([mask, going.long()[:, None]], 1)
        positions = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
    return [
        until(tokenizer.decode(tokens, skip_special_tokens=True), stops) if text is None else text
        for tokens, text in zip(written, texts, strict=True)
    ]
