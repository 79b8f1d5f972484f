"""Documents to windows to batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_eval_models import byte_tokenizer

from equipoise.errors import InputError
from equipoise.evaluation.data import Window, batches, windows
from equipoise.files.text import TextRecord

BOS, EOS = 1, 2
ascii_text = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=30)


def _tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_documents_are_joined_by_eos_and_cut(tokenizer):
    out = windows(tokenizer, [TextRecord("abc", "x"), TextRecord("de", "y"), TextRecord("fg", "x")], seq_len=4)
    a, b, c, d, e, f, g = _tokens(tokenizer, "abcdefg")
    # x: <s> a b c | </s> <s> f g; y: too short for a window, kept whole because it is the only one
    assert [(w.domain, w.input_ids.tolist()) for w in out] == [
        ("x", [BOS, a, b, c]),
        ("x", [EOS, BOS, f, g]),
        ("y", [BOS, d, e]),
    ]


def test_no_bos_where_the_tokenizer_adds_none():
    tokenizer = byte_tokenizer(bos=False)
    (window,) = windows(tokenizer, [TextRecord("ab", "x")], seq_len=8)
    assert window.input_ids.tolist() == _tokens(tokenizer, "ab")


@given(st.lists(st.tuples(ascii_text, st.sampled_from("xyz")), min_size=1), st.integers(2, 9))
def test_windows_are_the_stream_without_its_tail(tokenizer, documents, seq_len):
    records = [TextRecord(text, domain) for text, domain in documents]
    out = windows(tokenizer, records, seq_len)
    for domain in {record.domain for record in records}:
        stream: list[int] = []
        for record in records:
            if record.domain == domain:
                stream += [EOS] * bool(stream) + [BOS] + _tokens(tokenizer, record.text)
        mine = [w.input_ids for w in out if w.domain == domain]
        got = np.concatenate(mine).tolist()
        assert got == stream[: len(got)]
        assert all(len(w) == seq_len for w in mine) or len(mine) == 1
        assert len(stream) - len(got) < seq_len
        assert len(got) == len(stream) or len(mine[0]) == seq_len


def test_too_few_tokens_and_wrong_sizes(tokenizer):
    with pytest.raises(InputError, match=r"fewer tokens than needed: domain 'x' has 1, .* at least 2"):
        windows(byte_tokenizer(bos=False), [TextRecord("a", "x")], 8)
    with pytest.raises(InputError, match="fewer tokens than needed"):
        windows(tokenizer, [], 8)
    with pytest.raises(InputError, match="seq-len"):
        windows(tokenizer, [TextRecord("abc", "x")], 1)
    with pytest.raises(InputError, match="fewer tokens than needed"):
        batches([], 2)
    with pytest.raises(InputError, match="batch-size"):
        batches([Window(np.array([1, 2]), "x")], 0)


def test_batches_have_one_shape_and_mask_the_padding(tokenizer, mixtral):
    made = windows(tokenizer, [TextRecord("abcdefgh" * 2, "x"), TextRecord("ab", "y")], seq_len=5)
    out = batches(made, 2, mixtral.config)
    assert [tuple(b["input_ids"].shape) for b in out] == [(2, 5), (2, 5)]
    assert [b.domains for b in out] == [("x", "x"), ("x", "y")]
    assert set(out[0]) == {"input_ids", "attention_mask"}
    assert out[1]["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert out[1]["input_ids"][1, 3:].tolist() == [0, 0]
    assert mixtral(**out[1]).logits.shape == (2, 5, 259)


def test_encoder_decoder_halves(tokenizer, switch):
    made = windows(tokenizer, [TextRecord("abcdefgh", "x"), TextRecord("jk", "y")], seq_len=9)
    (out,) = batches(made, 8, switch.config)
    x = [BOS, *_tokens(tokenizer, "abcdefgh")]
    j, k = _tokens(tokenizer, "jk")
    assert out["input_ids"].tolist() == [x[:4], [BOS, 0, 0, 0]]
    assert out["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert out["labels"].tolist() == [x[4:], [j, k, -100, -100, -100]]
    assert out["decoder_input_ids"].tolist() == [[0, *x[4:8]], [0, j, 0, 0, 0]]
    assert out["decoder_attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert switch(**out).logits.shape == (2, 5, 259)


def test_a_model_that_does_not_fit_is_refused(mixtral):
    with pytest.raises(InputError, match=r"token 259, but the model's vocabulary ends at 258"):
        batches([Window(np.array([1, 259]), "x")], 1, mixtral.config)
    with pytest.raises(InputError, match="300 tokens are longer than the model's 256 positions"):
        batches([Window(np.ones(300, dtype=np.int64), "x")], 1, mixtral.config)
