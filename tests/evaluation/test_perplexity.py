"""Window losses against the definition, and the paired interval against simulation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tiny_eval_models import tiny_mixtral

from equipoise.errors import InputError
from equipoise.evaluation import perplexity
from equipoise.evaluation.data import batches, windows
from equipoise.evaluation.perplexity import TextResult, evaluate_text, paired_difference
from equipoise.files.text import TextRecord

TEXTS = [TextRecord("the quick brown fox jumps over the lazy dog", "x"), TextRecord("sphinx", "y")]


def _brute_force(model, window):
    """Mean -log p of tokens 1.. of one window alone, unpadded, a token and a forward pass at a time."""
    ids, losses = torch.tensor(window.input_ids), []
    for i in range(1, len(ids)):
        with torch.no_grad():
            logits = model(input_ids=ids[None, :i]).logits[0, -1]
        losses.append(-torch.log_softmax(logits.double(), -1)[ids[i]].item())
    return np.mean(losses), len(losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoder_only_is_the_definition(tokenizer, dtype):
    model = tiny_mixtral(dtype=dtype)
    made = windows(tokenizer, TEXTS, seq_len=16)
    result = evaluate_text(model, batches(made, 3, model.config))
    expected = [_brute_force(model, w) for w in made]
    # bfloat16 rounds differently in differently shaped products; the float32 run pins the definition
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    np.testing.assert_allclose(result.nll, [nll for nll, _ in expected], rtol=tolerance)
    assert result.tokens.tolist() == [n for _, n in expected] == [15, 15, 6]
    assert result.domains == ("x", "x", "y")
    total = sum(nll * n for nll, n in expected)
    assert result.perplexity == pytest.approx(math.exp(total / 36), rel=tolerance)
    assert result.by_domain()["y"].perplexity == pytest.approx(math.exp(expected[2][0]), rel=tolerance)


def test_left_padding_scores_the_same_tokens(tokenizer, mixtral):
    (window,) = windows(tokenizer, TEXTS[1:], seq_len=16)
    ids = torch.tensor(window.input_ids)[None]
    left = {
        "input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1),
        "attention_mask": torch.tensor([[0] * 3 + [1] * ids.shape[1]]),
    }
    result = evaluate_text(mixtral, [left])
    expected, n = _brute_force(mixtral, window)
    assert result.tokens.tolist() == [n]
    assert result.nll[0] == pytest.approx(expected, rel=1e-5)
    assert result.domains == ("text",)


def test_encoder_decoder_is_the_loss_of_transformers(tokenizer, switch):
    made = windows(tokenizer, TEXTS, seq_len=15)
    result = evaluate_text(switch, batches(made, 3, switch.config))
    for i, window in enumerate(made):
        ids = torch.tensor(window.input_ids)[None]
        half = ids.shape[1] // 2
        with torch.no_grad():  # it shifts the labels of itself
            loss = switch(input_ids=ids[:, :half], labels=ids[:, half:]).loss
        assert result.nll[i] == pytest.approx(loss.item(), rel=1e-5)
        assert result.tokens[i] == ids.shape[1] - half


def test_no_chunk_is_larger_than_allowed_and_chunks_add_up(tokenizer, mixtral, monkeypatch):
    made = batches(windows(tokenizer, TEXTS, seq_len=16), 3, mixtral.config)
    whole = evaluate_text(mixtral, made)
    monkeypatch.setattr(perplexity, "CHUNK_ELEMENTS", 4 * 259)
    seen = []
    cross_entropy = torch.nn.functional.cross_entropy

    def spy(logits, *args, **kwargs):
        seen.append(logits.shape[0])
        return cross_entropy(logits, *args, **kwargs)

    monkeypatch.setattr(perplexity.functional, "cross_entropy", spy)
    np.testing.assert_allclose(evaluate_text(mixtral, made).nll, whole.nll, rtol=1e-6)
    assert max(seen) == 4
    assert sum(seen) == 3 * 15


def test_progress_sees_every_batch(tokenizer, mixtral):
    made = batches(windows(tokenizer, TEXTS, seq_len=16), 2, mixtral.config)
    seen = []

    def track(items, total, what):
        for item in items:
            seen.append((total, what))
            yield item

    evaluate_text(mixtral, made, track)
    assert seen == [(2, "perplexity")] * 2


def test_nothing_to_score_is_refused(mixtral):
    lone = {"input_ids": torch.tensor([[5, 0]]), "attention_mask": torch.tensor([[1, 0]])}
    with pytest.raises(InputError, match="no window has a token"):
        evaluate_text(mixtral, [lone])
    with pytest.raises(InputError, match="no window has a token"):
        evaluate_text(mixtral, [])


def _result(nll, tokens):
    return TextResult(np.asarray(nll, dtype=float), np.asarray(tokens), ("x",) * len(tokens))


losses = st.lists(st.tuples(st.floats(0, 10), st.floats(-0.5, 0.5), st.integers(1, 300)), min_size=2, max_size=20)


@given(losses)
def test_the_difference_is_that_of_the_perplexities(rows):
    nll, change, tokens = map(np.array, zip(*rows, strict=True))
    before, after = _result(nll, tokens), _result(nll + change, tokens)
    percent, (low, high) = paired_difference(before, after)
    assert percent == pytest.approx(100 * (after.perplexity / before.perplexity - 1), abs=1e-6)
    assert low <= percent + 1e-9
    assert percent <= high + 1e-9
    absolute, (low, high) = paired_difference(before, after, relative=False)
    assert absolute == pytest.approx(after.perplexity - before.perplexity, abs=1e-6)
    back, (low_back, high_back) = paired_difference(after, before, relative=False)
    np.testing.assert_allclose([-back, -high_back, -low_back], [absolute, low, high], rtol=1e-6, atol=1e-6)


def test_nothing_changed_is_exactly_nothing():
    same = _result([2.0, 3.0, 2.5], [10, 20, 30])
    assert paired_difference(same, same) == (0.0, (0.0, 0.0))
    assert paired_difference(same, same, relative=False) == (0.0, (0.0, 0.0))


def test_one_window_has_no_interval_and_other_windows_no_pairs():
    delta, (low, high) = paired_difference(_result([2.0], [5]), _result([2.1], [5]))
    assert delta == pytest.approx(100 * (math.exp(0.1) - 1))
    assert math.isnan(low)
    assert math.isnan(high)
    with pytest.raises(InputError, match="same windows"):
        paired_difference(_result([2.0, 1.0], [5, 5]), _result([2.0, 1.0], [5, 6]))


@pytest.mark.parametrize("relative", [True, False])
def test_coverage_with_windows_of_unequal_length(relative):
    """Of 1,000 intervals from skewed, length-dependent differences, about 950 hold the population's value."""
    rng = np.random.default_rng(3)
    size = 200_000
    tokens = rng.integers(10, 256, size)
    nll = rng.normal(3, 0.5, size)
    change = 0.002 + rng.exponential(0.01, size) - 0.01 + 0.003 * (tokens > 128)
    truth, _ = paired_difference(_result(nll, tokens), _result(nll + change, tokens), relative=relative)
    held = 0
    for _ in range(1000):
        pick = rng.integers(0, size, 80)
        before, after = _result(nll[pick], tokens[pick]), _result((nll + change)[pick], tokens[pick])
        _, (low, high) = paired_difference(before, after, relative=relative)
        held += low <= truth <= high
    # binomial(1000, .95): five standard deviations are 34; skew costs the t interval a point or so
    assert 916 <= held <= 984


def test_agrees_with_the_bootstrap():
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 256, 300)
    nll = rng.normal(3, 0.5, 300)
    after = nll + rng.normal(0.004, 0.02, 300)
    _, (low, high) = paired_difference(_result(nll, tokens), _result(after, tokens))

    def percent(t, a, b, axis):
        return 100 * np.expm1((t * (a - b)).sum(axis) / t.sum(axis))

    check = stats.bootstrap(
        (tokens, after, nll),
        percent,
        paired=True,
        vectorized=True,
        rng=np.random.default_rng(1),
        n_resamples=4000,
    ).confidence_interval
    np.testing.assert_allclose([low, high], check, atol=0.05 * (high - low))
