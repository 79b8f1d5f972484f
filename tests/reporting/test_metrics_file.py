from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_run import make_run

from equipoise.errors import InputError
from equipoise.reporting import load_metrics, metrics_from_json, save_metrics


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_run(tmp_path_factory.mktemp("metrics") / "run", layers=3, experts=6)


def _changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    at: Any = changed
    *parts, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    for part in parts:
        at = at[part]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return changed


def test_what_is_saved_is_what_is_loaded(document: dict[str, Any], tmp_path: Path) -> None:
    metrics = metrics_from_json(document)
    save_metrics(metrics, tmp_path / "metrics.json")
    assert load_metrics(tmp_path / "metrics.json") == metrics
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == json.loads(json.dumps(document))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_summary_keeps_further_keys(document: dict[str, Any]) -> None:
    metrics = metrics_from_json(_changed(document, "summary.answer", [42, {"a": None}]))
    assert metrics.model_dump(mode="json")["summary"]["answer"] == [42, {"a": None}]


@pytest.mark.parametrize("ends", [None, [None, None], [float("nan"), float("nan")]])
def test_one_window_has_no_interval(document: dict[str, Any], ends: Any) -> None:
    changed = _changed(_changed(document, "summary.ppl_delta_ci95", ends), "perplexity.1.ci95", ends)
    metrics = metrics_from_json(changed)
    assert metrics.summary.ppl_delta_ci95 is None
    assert metrics.perplexity[1].ci95 is None


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("format", "equipoise-plan", "format"),
        ("version", 2, "version"),
        ("extra", 1, "extra: unknown key"),
        ("layers.0.extra", 1, "layers.0.extra: unknown key"),
        ("made_with.extra", "x", "made_with.extra: unknown key"),
        ("summary.lis_before", ..., "summary.lis_before"),
        ("summary.seconds", "61", "summary.seconds"),
        ("summary.ppl_after", float("nan"), "summary.ppl_after"),
        ("summary.ppl_delta_ci95", [0.1], "summary.ppl_delta_ci95"),
        ("bytes_after.int4", 5, "bytes_after.int4"),
        ("layers", [], "layers"),
        ("heldout_counts.1", [1, 2], "layer 1: heldout_counts has 2 experts"),
        ("heldout_slots.1", [1, 2], "layer 1: heldout_slots has 2 slots"),
        ("heldout_counts.0.0", -1, "heldout_counts.0.0"),
        ("heldout_counts.0.0", 10**7, "layer 0: lis_before"),
        ("heldout_slots.2.0", 10**7, "layer 2: lis_after"),
        ("layers.1.lis_before", 1.0, "layer 1: lis_before"),
        ("summary.lis_after", 0.5, "summary.lis_after"),
        ("summary.lis_after_in_sample", 0.5, "summary.lis_after_in_sample"),
        ("summary.bytes_after", 7, "summary.bytes_after is 7"),
        ("bytes_after.int8", 7, "bytes_after by precision"),
        ("layers.0.replicas", 99, "summary.replicas"),
        ("layers.0.quantized", 0, "summary.quantized"),
        ("perplexity.0.domain", "some", "exactly one entry of domain 'all'"),
        ("perplexity.2.domain", "encyclopedia", "no domain twice"),
        ("summary.ppl_before", 13.0, "summary.ppl_before"),
    ],
)
def test_wrong_metrics_are_refused(document: dict[str, Any], path: str, value: Any, says: str) -> None:
    with pytest.raises(InputError, match=None) as caught:
        metrics_from_json(_changed(document, path, value))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_contradicting_metrics_are_not_written(document: dict[str, Any], tmp_path: Path) -> None:
    metrics = metrics_from_json(document)
    wrong = metrics.model_copy(update={"bytes_after": {"original": 1}})
    with pytest.raises(InputError, match="bytes_after"):
        save_metrics(wrong, tmp_path / "metrics.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"9" * 5000, b"[" * 100_000])
def test_damaged_files_are_refused_with_their_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.json"
    with pytest.raises(InputError, match="no such metrics"):
        load_metrics(path)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"metrics .*metrics\.json"):
        load_metrics(path)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=3),
    st.just([]),
    st.just({}),
    st.lists(st.integers(-1, 3), max_size=3),
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_mutated_file_is_read_or_refused_never_a_traceback(document: dict[str, Any], data: st.DataObject) -> None:
    """Walk to a random place, put junk there or take it out."""
    changed = copy.deepcopy(document)
    at: Any = changed
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(at[key], (dict, list)) and at[key] and data.draw(st.booleans()):
            at = at[key]
            continue
        break
    if data.draw(st.booleans()):
        del at[key]
    else:
        at[key] = data.draw(JUNK)
    try:
        metrics = metrics_from_json(changed)
    except InputError:
        return
    kept = metrics.summary
    assert kept.bytes_after == sum(metrics.bytes_after.values())
    assert np.isclose(kept.lis_before, np.mean([layer.lis_before for layer in metrics.layers]), rtol=2e-3)
