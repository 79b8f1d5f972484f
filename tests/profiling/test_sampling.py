"""Sequences spread over the text."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.profiling.sampling import Batch, spread_out


def text(shapes: list[tuple[int, int]]) -> list[Batch]:
    """Batches [B, Q] in which every sequence has its own number; no padding."""
    made, number = [], 0
    for rows, width in shapes:
        ids = torch.arange(number, number + rows)[:, None].expand(rows, width)
        made.append({"input_ids": ids, "attention_mask": torch.ones(rows, width)})
        number += rows
    return made


SHAPES = st.lists(st.tuples(st.integers(1, 5), st.sampled_from([3, 4])), min_size=1, max_size=9)


@given(SHAPES, st.integers(1, 120))
def test_whole_sequences_evenly_and_about_as_many_as_asked(shapes: list[tuple[int, int]], tokens: int):
    batches = text(shapes)
    found = spread_out(batches, tokens)
    kept = [int(i) for batch in found for i in batch["input_ids"][:, 0]]
    rows = sum(len(batch["input_ids"]) for batch in batches)
    total = sum(batch["input_ids"].numel() for batch in batches)
    assert len(set(kept)) == len(kept) == min(rows, -(-tokens * rows // total))
    # No part of the text is left out that is longer than the distance of two.
    gaps = [b - a for a, b in zip([-1, *sorted(kept)], [*sorted(kept), rows], strict=True)]
    assert max(gaps) <= rows / len(kept) + 1
    for batch in found:
        assert len(batch["input_ids"]) <= max(rows for rows, _ in shapes)
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert bool((batch["input_ids"] == batch["input_ids"][:, :1]).all())


def test_nothing_and_everything():
    batches = text([(2, 3), (3, 3)])
    assert spread_out(batches, 0) == []
    every = torch.cat([batch["input_ids"] for batch in spread_out(batches, 10_000)])
    assert torch.equal(every, torch.cat([batch["input_ids"] for batch in batches]))


def test_padding_is_not_counted():
    batches = text([(4, 4)])
    batches[0]["attention_mask"][:, 1:] = 0
    assert sum(len(batch["input_ids"]) for batch in spread_out(batches, 2)) == 2
