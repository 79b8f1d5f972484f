"""vLLM's returned routing: base64 arrays in completion responses."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exchange_cases import damaged, unless_refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from equipoise.errors import InputError
from equipoise.exchange import ImportOptions, import_statistics

FOUR = ImportOptions(num_experts=4)


def encoded(ids: Any, dtype: Any = np.uint8, pickled: bool = False) -> str:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(ids, dtype=object if pickled else dtype), allow_pickle=pickled)
    return base64.b64encode(buffer.getvalue()).decode()


def response(*choices: Any) -> str:
    return json.dumps({"id": "cmpl-1", "choices": [{"index": i, "routed_experts": c} for i, c in enumerate(choices)]})


def test_responses_become_steps_without_dense_layers_and_unused_rows(tmp_path: Path) -> None:
    # Layer 0 is dense (zeros); the last token of the first choice was never computed.
    first = [[[0, 0], [0, 1]], [[0, 0], [3, 2]], [[0, 0], [0, 0]]]
    lines = [response(encoded(first), None), "", response(encoded([[[0, 0], [1, 3]]]), encoded([[[0, 0], [1, 0]]]))]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    profile = import_statistics([tmp_path / "a.jsonl"], "vllm", FOUR).profile
    assert profile.layer_ids.tolist() == [1]
    assert profile.topk_ids is not None
    assert profile.topk_ids[:, 0].tolist() == [[0, 1], [3, 2], [1, 3], [1, 0]]
    assert profile.series is not None
    assert profile.series.tolist() == [[[1, 1, 1, 1]], [[1, 2, 0, 1]]]
    assert (profile.top_k, profile.meta["tokens"]) == (2, 4)


def test_one_expert_a_token_keeps_true_zeros(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(response(encoded([[[0], [0], [1]], [[0], [2], [0]], [[0], [0], [0]]])))
    done = import_statistics([tmp_path / "a.json"], "vllm", FOUR)
    assert done.profile.layer_ids.tolist() == [1, 2]
    assert done.profile.counts.tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]
    assert any("k is 1" in note for note in done.notes)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.integers(2, 4), st.integers(1, 5))
def test_ids_come_back_as_they_were(tmp_path: Path, seed: int, top_k: int, answers: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [np.argsort(rng.random((int(rng.integers(1, 6)), 3, 9)), -1)[..., :top_k] for _ in range(answers)]
    (tmp_path / "a.jsonl").write_text("\n".join(response(encoded(part)) for part in parts))
    profile = import_statistics([tmp_path / "a.jsonl"], "vllm", ImportOptions(num_experts=9)).profile
    assert profile.topk_ids is not None
    assert np.array_equal(profile.topk_ids, np.concatenate(parts))
    assert profile.counts.sum() == sum(part.size for part in parts)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (response(encoded([[[0, 4]]])), "outside 0..3: see --num-experts"),
        (response(encoded([[0, 1]])), r"\[tokens, layers, k\]"),
        (response(encoded([[[0.5]]], np.float32)), r"\[tokens, layers, k\]"),
        (response(encoded([[[0, 1]]], pickled=True)), "holds pickled objects"),
        (response(encoded([[[0, 1]]]), encoded([[[0, 1, 2]]])), "layers x experts a token"),
        (response("~~~"), "not base64"),
        (response("ü"), "routed_experts is not"),
        (response([[0, 1]]), "not a base64 string"),
        (response(None), "no choice has routed_experts"),
        ('{"choices": 3}', "list of choices"),
        ("[1]", "list of choices"),
        ("{", "line 1 is not JSON"),
    ],
)
def test_wrong_responses_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=reason):
        import_statistics([tmp_path / "a.json"], "vllm", FOUR)


def test_the_number_of_experts_must_be_given(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(response(encoded([[[0, 1]]])))
    with pytest.raises(InputError, match="--num-experts"):
        import_statistics([tmp_path / "a.json"], "vllm")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), inside=st.booleans())
def test_damaged_bytes_are_read_or_refused(tmp_path: Path, data: st.DataObject, inside: bool) -> None:
    text = response(encoded([[[0, 1]], [[2, 3]]])).encode()
    if inside:  # damage the array, under a whole envelope
        array = base64.b64decode(encoded([[[0, 1]], [[2, 3]]]))
        text = response(base64.b64encode(data.draw(damaged(array))).decode()).encode()
    else:
        text = data.draw(damaged(text))
    (tmp_path / "a.json").write_bytes(text)
    unless_refused(lambda: import_statistics([tmp_path / "a.json"], "vllm", FOUR))
