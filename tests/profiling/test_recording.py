"""Recorded streams: every selection once, in the window and the part of its token, padding nowhere."""

import numpy as np
import pytest
import torch

from equipoise.evaluation.data import Window, batches
from equipoise.profiling import watch
from equipoise.profiling.recording import record_sequences, record_windows, text_tokens
from families.families_support import own_model, reading_routers, shared_model, text
from tiny import EXPERTS


def sequences(lengths, seed=3):
    return [Window(text(1, length, seed + i)[0].numpy(), "x") for i, length in enumerate(lengths)]


@torch.no_grad()
def routed_tokens(model, rows):
    """int64 [L, T, k] selections of the tokens of all rows, one after the other, from the routers."""
    out = []
    for row in rows:
        with reading_routers(model) as log:
            model(input_ids=torch.from_numpy(row.input_ids)[None])
        out.append(torch.stack([calls[0] for calls in log.calls]))
    return torch.cat(out, 1).numpy()


@pytest.mark.parametrize(("window", "parts"), [(7, 3), (16, 8), (5, 8)])
def test_windows_hold_the_tokens_of_the_text_in_order(window, parts):
    model = shared_model("mixtral")
    rows = sequences([9, 4, 12, 6, 11])
    routed = routed_tokens(model, rows)
    made = batches(rows, 2, model.config)
    assert any((batch["attention_mask"] == 0).any() for batch in made)
    found = list(record_windows(model, made, window, parts))
    assert len(found) == 42 // window
    number = min(parts, window)
    edges = np.arange(number + 1) * window // number
    for n, counts in enumerate(found):
        assert counts.shape == (number, len(routed), EXPERTS)
        for p in range(number):
            tokens = routed[:, n * window + edges[p] : n * window + edges[p + 1]]
            wanted = np.stack([np.bincount(layer.ravel(), minlength=EXPERTS) for layer in tokens])
            assert np.array_equal(counts[p], wanted)


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers", "deepseek_v3"])
def test_sequences_are_counted_apart(family):
    model = shared_model(family)
    rows = sequences([10, 6, 8])
    made = batches(rows, 3, model.config)
    (together,) = record_sequences(model, made)
    assert together.shape[0] == 3
    with torch.no_grad(), watch(model) as load:
        model(**{k: v for k, v in made[0].items() if k != "labels"})
    assert np.array_equal(together.sum(0), load.counts)
    if family == "mixtral":
        routed = routed_tokens(model, rows)
        wanted = np.stack([np.bincount(layer.ravel(), minlength=EXPERTS) for layer in routed[:, 10:16]])
        assert np.array_equal(together[1], wanted)


def test_an_encoder_and_a_decoder_share_the_windows():
    model = own_model("switch_transformers")
    made = batches(sequences([12] * 4), 2, model.config)
    assert text_tokens(made[0]).tolist() == [12, 12]
    found = np.stack(list(record_windows(model, made, 24, 4)))
    # Every token goes to one expert or is dropped at capacity; of each layer the same half of the text is in a window.
    assert found.shape[0] == 2
    with torch.no_grad(), watch(model) as load:
        for batch in made:
            model(**{k: v for k, v in batch.items() if k != "labels"})
    assert np.array_equal(found.sum((0, 1)), load.counts)
    assert (found.sum((1, 3)) <= 12).all()


def test_the_model_is_left_as_it_was_when_a_stream_is_not_read_to_its_end():
    model = own_model("mixtral")
    stream = record_windows(model, batches(sequences([8, 8, 8]), 1, model.config), 4)
    next(stream)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.is_grad_enabled()
