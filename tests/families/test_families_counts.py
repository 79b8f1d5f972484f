"""Loads against the routers: what `profile` and `watch` count is what each router chose for real tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families_support import (
    NAMES,
    batch_of,
    logits,
    make_plan,
    own_model,
    padded,
    reading_routers,
    replica_slots,
    shared_model,
    text,
)

from equipoise.options import ProfileOptions
from equipoise.profiling import Load, profile, watch
from equipoise.runtime import apply
from tiny import build

LENGTHS = [5, 11, 1, 8]


@pytest.mark.parametrize("name", NAMES)
def test_profile_counts_what_the_routers_chose(name: str):
    model = shared_model(name)
    batches = [
        padded(LENGTHS, "right"),
        padded([4, 9], "left", seed=20),
        (text(2, 6), torch.ones(2, 6, dtype=torch.int64)),
    ]
    with reading_routers(model) as log:
        measured = profile(model, [batch_of(model, *batch) for batch in batches], ProfileOptions(importance_tokens=0))
    expected = np.zeros_like(measured.counts)
    for number, (_, mask) in enumerate(batches):
        one = type(log)(len(log.calls))
        one.calls = [calls[number : number + 1] for calls in log.calls]
        expected += one.counts(mask)
    np.testing.assert_array_equal(measured.counts, expected)
    assert measured.series is not None
    assert len(measured.series) == 3
    tokens = sum(LENGTHS) + 13 + 12
    assert measured.meta["tokens"] == tokens
    if name not in (
        "zaya",
        "ernie4_5_vl_moe",
    ):  # tokens may skip all experts; text never meets the experts for pictures
        assert (measured.counts.sum(1) == tokens * measured.top_k).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_never_counts(name: str, side: str):
    model = shared_model(name)
    ids, mask = padded(LENGTHS, side)
    with reading_routers(model) as log, watch(model) as load:
        logits(model, ids, mask)
    np.testing.assert_array_equal(load.counts, log.counts(mask))
    assert load.counts.sum() < log.counts().sum()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_a_text_counts_the_same_alone_and_padded(name: str, side: str):
    model = shared_model(name)
    with watch(model) as together:
        logits(model, *padded(LENGTHS, side))
    with watch(model) as alone:
        for row, length in enumerate(LENGTHS):
            logits(model, text(1, length, 1 + row))
    np.testing.assert_array_equal(together.counts, alone.counts)


@pytest.mark.parametrize("name", NAMES)
def test_generate_counts_what_forward_counts(name: str):
    """Prefill and each cached step; the last token is never fed back.

    The padding token is suppressed: a random model may write it, and written by a model it counts as padding.
    """
    model = shared_model(name)
    ids, mask = padded(LENGTHS, "left")
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "suppress_tokens": [0]}
    with reading_routers(model) as log, watch(model) as load:
        out = model.generate(input_ids=ids, attention_mask=mask, **options)
    np.testing.assert_array_equal(load.counts, log.counts(mask))
    assert all(len(calls) in (0, 1, 5) for calls in log.calls)  # prefill and 4 steps; an encoder runs once

    with watch(model) as again, torch.no_grad():
        if model.config.is_encoder_decoder:
            model(input_ids=ids, attention_mask=mask, decoder_input_ids=out[:, :-1])
        else:
            assert out.shape[1] == ids.shape[1] + 5
            fed = out[:, :-1]
            longer = torch.cat([mask, torch.ones(len(ids), 4, dtype=mask.dtype)], 1)
            positions = (longer.cumsum(1) - 1).clamp(min=0)
            model(input_ids=fed, attention_mask=longer, position_ids=positions)
    np.testing.assert_array_equal(load.counts, again.counts)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_next", "deepseek_v3", "switch_transformers"])
def test_slots_are_counted_in_generate(name: str):
    model = own_model(name)
    apply(model, make_plan(model, replica_slots))
    ids, mask = padded(LENGTHS, "left")
    with watch(model) as load:
        model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=4, min_new_tokens=4)
    assert load.counts.sum() > 0
    for counts, slots in zip(load.counts, load.slot_counts, strict=True):
        assert len(slots) > len(counts)
        assert slots.sum() == counts.sum()


@pytest.mark.parametrize("side", ["left", "right"])
def test_dropped_tokens_of_switch_do_not_count(side: str):
    """Beyond the capacity of an expert Switch drops tokens; a dropped token is no selection."""
    model = build("switch_transformers", expert_capacity=2)
    ids, mask = padded([12, 7], side)
    with reading_routers(model) as log, watch(model) as load:
        logits(model, ids, mask)
    np.testing.assert_array_equal(load.counts, log.counts(mask))
    assert (load.counts.sum(1) < 19).all()
    assert load.counts.max() <= 4


@pytest.mark.parametrize("pad_is_end", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_next", "gemma4", "switch_transformers"])
def test_ended_texts_in_generate_do_not_count(name: str, pad_is_end: bool):
    """`generate` feeds padding, with a mask of ones, for a text that has ended while others go on."""
    model = own_model(name)
    ids, mask = padded([6, 4, 5], "left")
    model.generation_config.eos_token_id = None

    def generate() -> tuple[torch.Tensor, Load]:
        torch.manual_seed(0)  # sampled, because a tiny model's greedy texts repeat one token
        with watch(model) as load:
            out = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, max_new_tokens=8)
        return out, load

    free, everything = generate()
    start = 1 if model.config.is_encoder_decoder else ids.shape[1]
    new = free[:, start:].tolist()
    # An end that one text writes early and another never.
    end = next(token for token in new[0][:4] if token not in new[1])
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = end if pad_is_end else 0
    _, load = generate()

    written = [row.index(end) + 1 if end in row else len(row) for row in new]
    # Fed back: what a text wrote up to its end, but never the last token of the whole generation.
    fed = sum(min(length, 7) for length in written)
    unfed = 3 * 7 - fed
    assert unfed > 0
    decoder = slice(-1, None) if model.config.is_encoder_decoder else slice(None)
    missing = (everything.counts - load.counts).sum(1)
    assert (missing[decoder] == unfed * load.top_k).all()
    if model.config.is_encoder_decoder:
        assert missing[0] == 0


def test_a_single_padding_token_without_cache_is_told_by_the_mask():
    """Only a cached step of generation reads tokens; elsewhere the mask alone decides."""
    model = shared_model("mixtral")
    ids = torch.zeros(2, 1, dtype=torch.int64)
    with watch(model) as load:
        logits(model, ids)
    assert (load.counts.sum(1) == 2 * 2).all()
