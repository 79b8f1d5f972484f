import gzip
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_moe_modules import scripts

from equipoise.errors import InputError

data = scripts.data


def write(directory, stem, rows):
    with gzip.open(directory / f"{stem}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_a_tenth_of_the_documents_is_held_out(tmp_path):
    write(tmp_path, "text_contracts", [{"text": f"contract {n}"} for n in range(50)])
    parts = data.documents(tmp_path, "legal")
    assert len(parts) == 50
    assert sum(held for _, held in parts) == 5
    assert parts == data.documents(tmp_path, "legal")


def test_biomedical_text_is_held_out_by_its_own_test_split(tmp_path):
    rows = [{"CONTEXTS": [f"a{n}"], "LONG_ANSWER": "b", "in_test_split": n % 3 == 0} for n in range(9)]
    write(tmp_path, "pubmedqa_labeled", rows)
    held = {text for text, held in data.documents(tmp_path, "biomedical") if held}
    assert held == {"a0\nb", "a3\nb", "a6\nb"}


def test_tested_questions_are_dropped(tmp_path):
    item = {"choices": ["x", "y"], "answer": 1}
    write(tmp_path, "arc_train", [{**item, "question": q} for q in ("kept?", "tested easy?", "tested hard?")])
    write(tmp_path, "arc_easy_test", [{"question": "tested easy?"}])
    write(tmp_path, "arc_challenge_test", [{"question": "tested hard?"}])
    write(tmp_path, "wikipedia_qa_pairs", [{"question": "Who?", "answer": a} for a in ("yes", "a man from Ohio", None)])
    texts = {text for text, _ in data.documents(tmp_path, "questions")}
    assert texts == {"Question: kept?\nAnswer: y", "Question: Who?\nAnswer: a man from Ohio"}


def test_missing_text_is_said_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"has no text_contracts\.jsonl"):
        data.documents(tmp_path, "legal")


def test_tokens_of_training_stand_for_the_text(tmp_path):
    def tokenizer(texts, add_special_tokens):
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

    write(tmp_path, "text_contracts", [{"text": "word " * n} for n in range(1, 21)])
    read = {held: data.tokenized(tmp_path, tokenizer, "legal", held) for held in (False, True)}
    ends = np.concatenate(list(read.values())) == data.END_OF_TEXT
    assert ends.sum() == 20
    assert (~ends).sum() == sum(range(1, 21))
    assert all(tokens[0] == data.END_OF_TEXT for tokens in read.values())
    kept = tmp_path / "kept"
    kept.mkdir()
    np.savez(kept / data.TOKENS, **{"legal.train": read[False], "legal.held": read[True]})
    for held in (False, True):
        assert data.tokenized(kept, None, "legal", held).tolist() == read[held].tolist()
    assert len(read[True]) < len(read[False])


@settings(max_examples=30, deadline=None)
@given(size=st.integers(24, 300), length=st.integers(2, 12), seed=st.integers(0, 9))
def test_each_pass_over_a_stream_takes_every_piece_once(size, length, seed):
    tokens = np.arange(size, dtype=np.int32)
    pieces = (size - length) // length
    for turn in (0, 1):
        windows = [data.training_window(tokens, length, turn * pieces + n, [seed]) for n in range(pieces)]
        starts = sorted(int(window[0]) for window in windows)
        assert len(set(starts)) == pieces
        assert {b - a for a, b in itertools.pairwise(starts)} <= {length}
        assert all(np.array_equal(window, np.arange(window[0], window[0] + length)) for window in windows)


def test_held_out_windows_do_not_overlap():
    windows = data.held_out_windows(np.arange(1000, dtype=np.int32), 64, 5)
    assert windows.shape == (5, 64)
    assert len(np.unique(windows)) == windows.size
    assert data.held_out_windows(np.arange(130, dtype=np.int32), 64, 5).shape == (2, 64)


def separable(seed=0, each=300):
    """Tokens of three domains and four kinds: float32 [N, 24], domain and kind of each."""
    rng = np.random.default_rng(seed)
    domain, kind = rng.integers(3, size=3 * each), rng.integers(4, size=3 * each)
    x = rng.standard_normal((3 * each, 24)) * 0.3
    x[np.arange(len(x)), domain] += 3
    x[np.arange(len(x)), 4 + kind] += 3
    return x.astype(np.float32), domain, kind


def purity(labels, groups):
    table = np.zeros((labels.max() + 1, groups.max() + 1))
    np.add.at(table, (labels, groups), 1)
    return table.max(0).sum() / len(labels)


def test_gamma_turns_the_start_from_kinds_of_token_to_domains():
    x, domain, kind = separable()
    purities = {}
    for gamma in (0.0, 2.0):
        router = scripts.routers.start_router(x, domain, 4, np.random.default_rng(3), gamma=gamma, components=6)
        assert router.shape == (4, 24)
        first = (x @ router.T).argmax(1)
        assert len(set(first)) == 4
        purities[gamma] = purity(first, domain), purity(first, kind)
    assert purities[0.0][1] > purities[2.0][1]
    assert purities[0.0][0] < purities[2.0][0]


@pytest.mark.parametrize("sharpness", [0.6, 0.7, 0.9])
def test_the_first_expert_has_the_weight_asked_for(sharpness):
    x, domain, _ = separable()
    router = scripts.routers.start_router(x, domain, 4, np.random.default_rng(0), components=6, sharpness=sharpness)
    top = np.sort(x @ router.T, 1)[:, -2:]
    assert abs((1 / (1 + np.exp(top[:, 0] - top[:, 1]))).mean() - sharpness) < 1e-3


@given(
    st.lists(st.integers(300, 3_000_000), min_size=8, max_size=8), st.integers(1, 6), st.sampled_from([0.3, 0.5, 1.0])
)
def test_windows_that_follow_the_size_of_a_stream(sizes, scale, power):
    recipe = scripts.recipe
    streams = [stream for stream in recipe.PLAN if stream != "own"]
    tokens = {f"{stream}.train": np.zeros(size, np.int32) for stream, size in zip(streams, sizes, strict=True)}
    options = recipe.Options(scale=scale, by_size=power)
    sized = recipe.sized(options, tokens)
    assert len(sized.plan) == len(options.plan)
    assert sized.plan.count("own") == options.plan.count("own")
    counts = [sized.plan.count(stream) for stream in streams]
    assert min(counts) >= 1
    order = np.argsort(sizes, kind="stable")
    assert all(counts[a] <= counts[b] + 1 for a, b in itertools.pairwise(order))
    assert recipe.sized(recipe.Options(scale=scale), tokens).plan == options.plan
    taught = [stream in recipe.BETA for stream in sized.plan]
    assert taught == sorted(taught, reverse=True)
