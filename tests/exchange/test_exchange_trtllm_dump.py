"""TensorRT-LLM's statistics directory: sums over ranks, whole grids only, damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exchange_cases import damaged, unless_refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from equipoise.errors import InputError
from equipoise.exchange import ImportOptions, import_statistics


def directory(path: Path, ranks: dict[int, dict[str, Any]], meta: dict[str, Any] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "meta_info.json").write_text(json.dumps(meta or {"num_experts": 3, "num_experts_per_token": 2}))
    for rank, records in ranks.items():
        arrays = {key: np.asarray(value, dtype=np.int64) for key, value in records.items()}
        save_file(arrays, path / f"rank{rank}.safetensors")
    return path


def test_ranks_are_summed_and_iterations_are_steps(tmp_path: Path) -> None:
    ranks = {
        0: {"100_4": [1, 2, 3], "100_10": [6, 0, 0], "101_4": [0, 0, 2], "101_10": [1, 1, 0]},
        1: {"100_4": [1, 0, 1], "100_10": [0, 0, 2], "101_4": [4, 4, 4], "101_10": [0, 6, 6]},
    }
    meta = {"num_experts": 3, "num_experts_per_token": 2, "ep_size": 2, "experts_per_rank": 1}
    path = directory(tmp_path / "expert_statistic", ranks, meta)
    save_file({"100_4": np.ones((5, 2), dtype=np.int32)}, path / "rank0_raw.safetensors")  # ids, not counts
    profile = import_statistics([path], "trtllm").profile
    assert profile.layer_ids.tolist() == [4, 10]
    assert profile.series is not None
    assert profile.series.tolist() == [[[2, 2, 4], [6, 0, 2]], [[4, 4, 6], [1, 7, 6]]]
    assert profile.counts.tolist() == [[6, 6, 10], [7, 7, 8]]
    assert (profile.top_k, profile.meta["tokens"]) == (2, 11)
    assert "iterations 100 to 101" in profile.meta["data"]


def test_a_missing_rank_is_mentioned(tmp_path: Path) -> None:
    done = import_statistics([directory(tmp_path / "d", {0: {"1_0": [1, 1, 0]}, 2: {"1_0": [1, 0, 1]}})], "trtllm")
    assert any("rank 1" in note for note in done.notes)
    assert done.profile.series is None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_selection_is_counted_once(tmp_path: Path, data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3)), 3)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    counts = rng.integers(1, 2**40, shape)  # ranks, iterations, layers, experts
    for old in tmp_path.glob("d/*"):
        old.unlink()
    ranks = {
        r: {f"{i + 9}_{la + 1}": counts[r, i, la] for i in range(shape[1]) for la in range(shape[2])}
        for r in range(shape[0])
    }
    windows = data.draw(st.integers(0, 5))
    profile = import_statistics([directory(tmp_path / "d", ranks)], "trtllm", ImportOptions(windows)).profile
    assert np.array_equal(profile.counts, counts.sum((0, 1)))
    if profile.series is not None:
        assert np.array_equal(profile.series.sum(0), profile.counts)
        assert len(profile.series) == (min(shape[1], windows) if windows else shape[1])


@pytest.mark.parametrize(
    ("ranks", "meta", "reason"),
    [
        ({0: {"1_0": [1, 2]}}, None, r"rank0.safetensors: 1_0 is int64 \(2,\), integers \(3,\)"),
        ({0: {"1_None": [1, 2, 3]}}, None, "'1_None' is not <iteration>_<layer>"),
        ({0: {"1_0": [1, -2, 3]}}, None, "outside 0"),
        ({0: {"1_0": [1, 2, 2**62]}}, None, "outside 0"),
        ({0: {"1_0": [1, 2, 3], "2_1": [1, 2, 3]}}, None, "iteration 1 has no counts of layer 1"),
        ({0: {"1_0": [0, 0, 0]}}, None, "no selection"),
        ({}, None, "holds no rank"),
        ({0: {}}, None, "no iteration"),
        ({0: {"1_0": [1, 2, 3]}}, {"num_experts": 3}, "num_experts_per_token: Field required"),
        ({0: {"1_0": [1, 2, 3]}}, {"num_experts": "3", "num_experts_per_token": 2}, "num_experts: .*valid integer"),
        ({0: {"1_0": [1, 2, 3]}}, {"num_experts": 3, "num_experts_per_token": 4}, "4 experts a token, but 3"),
    ],
)
def test_wrong_directories_are_refused(tmp_path: Path, ranks: Any, meta: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        import_statistics([directory(tmp_path / "d", ranks, meta)], "trtllm")


def test_what_is_not_a_directory_of_statistics_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, reason in (("file", "give the one directory"), ("empty", "meta_info.json is missing")):
        with pytest.raises(InputError, match=reason):
            import_statistics([tmp_path / name], "trtllm")
    path = directory(tmp_path / "d", {})
    (path / "rank0.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(InputError, match=r"rank0.safetensors: it is not a readable .safetensors"):
        import_statistics([path], "trtllm")
    (path / "rank0.safetensors").write_bytes(save({"1_0": np.ones(3, dtype=np.float32)}))
    with pytest.raises(InputError, match="float32"):
        import_statistics([path], "trtllm")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = directory(tmp_path / "d", {0: {"1_0": [1, 2, 3]}, 1: {"1_0": [1, 0, 3]}})
    victim = path / data.draw(st.sampled_from(["meta_info.json", "rank0.safetensors", "rank1.safetensors"]))
    victim.write_bytes(data.draw(damaged(victim.read_bytes())))
    unless_refused(lambda: import_statistics([path], "trtllm"))
