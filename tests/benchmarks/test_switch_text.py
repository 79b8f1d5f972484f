import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from switch_modules import scripts

from equipoise import InputError

text = scripts.text


@settings(deadline=None, max_examples=60)
@given(length=st.integers(12, 200), seed=st.integers(0, 10_000))
def test_span_corruption_loses_nothing(length, seed):
    if text.noise_lengths(length)[1] > text.SENTINELS:
        length = 100
    window = np.random.default_rng(seed).integers(100, 6000, length)
    inputs, targets = text.corrupt(window, np.random.default_rng(seed))
    assert (len(inputs), len(targets)) == text.corrupted_lengths(length)
    assert inputs[-1] == targets[-1] == text.END
    spans, current = {}, None
    for token in targets[:-1]:
        if token < 100:
            current = spans.setdefault(int(token), [])
        else:
            current.append(int(token))
    assert all(spans.values()), "no span is empty"
    restored = []
    for token in inputs[:-1]:
        restored += spans.pop(int(token)) if token < 100 else [int(token)]
    assert restored == window.tolist()
    assert not spans


def test_noise_is_that_of_t5():
    assert text.noise_lengths(128) == (19, 6)
    assert text.corrupted_lengths(128) == (116, 26)
    assert text.noise_lengths(text.WINDOW)[1] <= text.SENTINELS


def test_spans_differ_between_seeds_and_not_within_one():
    window = np.arange(100, 228)
    first, again, other = (text.corrupted_batch([(window, (s,))])[0] for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_continuation_is_the_window_in_two_parts():
    windows = np.arange(100, 100 + 2 * 80).reshape(2, 80)
    inputs, targets = text.continued_batch(windows)
    assert inputs.shape == (2, text.PREFIX + 2)
    assert targets.shape == (2, text.CONTINUATION + 1)
    joined = np.concatenate([inputs[:, : text.PREFIX], targets[:, 1:]], 1)
    assert np.array_equal(joined, windows)
    assert (inputs[:, -2] == text.FIRST_SENTINEL).all()
    assert (targets[:, 0] == text.FIRST_SENTINEL).all()


def test_the_repository_has_its_tokenizer():
    tokenizer = text.load_tokenizer()
    assert text.TOKENIZER.stat().st_size < 10**6
    assert len(tokenizer) == text.VOCABULARY
    assert tokenizer.pad_token_id == text.PAD
    assert tokenizer.eos_token_id == text.END
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == text.FIRST_SENTINEL
    ids = tokenizer("How old is the Ünited Kingdom, 1707?")["input_ids"]
    assert ids[-1] == text.END
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "how old is the ünited kingdom, 1707?"


def test_a_new_tokenizer_keeps_the_special_ids():
    made = text.train_tokenizer(["One fish, two fish."] * 20, vocabulary=300)
    assert [made.token_to_id(t) for t in ("<pad>", "</s>", "<extra_id_0>")] == [0, 1, 2]
    assert made.encode("two").ids[-1] == text.END


def test_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match="--new-tokenizer"):
        text.load_tokenizer(tmp_path / "none.json")


def test_a_tenth_of_wikitext_is_held_out(tmp_path):
    rows = [{"title": str(n), "text": f"article {n}"} for n in range(30)]
    path = tmp_path / "text_wikitext2_train_prefix.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = text.documents(tmp_path, "wikitext")
    assert sorted(t for t, _ in found) == sorted(row["text"] for row in rows)
    assert sum(held for _, held in found) == 3
    kept, held = (text.tokenized(tmp_path, text.load_tokenizer(), "wikitext", part) for part in (False, True))
    assert (kept == text.END).sum() == 27
    assert (held == text.END).sum() == 3
