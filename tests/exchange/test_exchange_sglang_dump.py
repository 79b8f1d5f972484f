"""SGLang's recorder files: the three kinds, several ranks, unsafe and damaged content."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exchange_cases import damaged, unless_refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from equipoise.errors import InputError
from equipoise.exchange import ImportOptions, import_statistics

FUZZ = settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
MAP = [[0, 1, 2, 0], [0, 1, 2, 0], [2, 1, 0, 2]]
"""Layers 0 (dense) to 2, 3 logical experts in 4 slots."""


def stat(path: Path, counts: Any) -> Path:
    count = torch.tensor(np.asarray(counts), dtype=torch.int32)
    torch.save({"rank": 0, "logical_count": count, "average_utilization_rate_over_window": None}, path)
    return path


def record(number: int, rank: int, ids: Any = None, counts: Any = None) -> dict[str, Any]:
    """A forward pass of a rank; ids [L, tokens, K] are physical, -1 pads."""
    out: dict[str, Any] = {"forward_pass_id": number, "rank": rank, "gatherer_key": "primary"}
    if ids is not None:
        ids = np.asarray(ids)
        counts = [np.bincount(row[row >= 0], minlength=4) for row in ids.reshape(len(ids), -1)]
        out |= {"topk_ids_of_layer": torch.tensor(ids, dtype=torch.int32), "input_ids": [1], "misc_objects": []}
    return out | {"global_physical_count": torch.tensor(np.asarray(counts), dtype=torch.int32)}


def detail(path: Path, records: list[dict[str, Any]], table: Any = MAP) -> Path:
    torch.save({"records": records, "last_physical_to_logical_map": torch.tensor(table)}, path)
    return path


def test_stat_becomes_counts_and_series(tmp_path: Path) -> None:
    # Layer 0 is dense; step 2 is an unused row of the buffer.
    steps = [[[0, 0], [3, 1]], [[0, 0], [5, 7]], [[0, 0], [0, 0]]]
    done = import_statistics([stat(tmp_path / "a.pt", steps)], "sglang", ImportOptions(top_k=2, model="m"))
    profile = done.profile
    assert profile.counts.tolist() == [[8, 8]]
    assert profile.layer_ids.tolist() == [1]
    assert profile.series is not None
    assert profile.series.tolist() == [[[3, 1]], [[5, 7]]]
    assert (profile.top_k, profile.meta["tokens"], profile.meta["model"]) == (2, 8, "m")
    assert profile.meta["steps_in_order"] is True
    assert any("dense: 0" in note for note in done.notes)


def test_stat_of_a_buffer_with_a_gap_is_put_in_order(tmp_path: Path) -> None:
    # The writer started at row 2 (the buffer's index survives a dump): time runs 2, 3, 0.
    rows = [[[9, 0]], [[0, 0]], [[1, 0]], [[2, 5]]]
    done = import_statistics([stat(tmp_path / "a.pt", rows)], "sglang")
    assert done.profile.series is not None
    assert done.profile.series[:, 0, 0].tolist() == [1, 2, 9]
    assert done.profile.meta["steps_in_order"] is True


def test_stat_of_a_full_buffer_is_said_to_be_unordered(tmp_path: Path) -> None:
    done = import_statistics([stat(tmp_path / "a.pt", [[[1, 2]], [[3, 4]]])], "sglang")
    assert done.profile.meta["steps_in_order"] is False
    assert any("order of time" in note for note in done.notes)
    assert any("--top-k" in note for note in done.notes)
    assert done.profile.top_k == 0


def test_per_pass_maps_physical_to_logical_and_sums_ranks(tmp_path: Path) -> None:
    dense = [0, 0, 0, 0]
    first = detail(
        tmp_path / "r0.pt",
        [record(8, 0, counts=[dense, [1, 2, 3, 4], [1, 0, 0, 2]]), record(5, 0, counts=[dense, [1, 0, 0, 0], dense])],
    )
    second = detail(tmp_path / "r1.pt", [record(8, 1, counts=[dense, [10, 0, 0, 10], [0, 5, 0, 0]])])
    profile = import_statistics([first, second], "sglang").profile
    assert profile.layer_ids.tolist() == [1, 2]
    assert profile.series is not None
    # Pass 5, then pass 8; expert 0 of layer 1 is slots 0 and 3, expert 2 of layer 2 too.
    assert profile.series.tolist() == [[[1, 0, 0], [0, 0, 0]], [[25, 2, 3], [0, 5, 3]]]
    assert import_statistics([tmp_path], "sglang").profile.counts.tolist() == profile.counts.tolist()


def test_per_token_keeps_logical_ids_in_order(tmp_path: Path) -> None:
    none = [-1, -1, -1]
    late = record(2, 0, ids=[[none, none], [[3, 1, -1], [2, 0, -1]], [[0, 1, -1], [3, 2, -1]]])
    early = record(1, 0, ids=[[none], [[1, 2, -1]], [[1, 2, -1]]])
    done = import_statistics([detail(tmp_path / "a.pt", [late, early])], "sglang", ImportOptions(top_k=2))
    profile = done.profile
    assert profile.topk_ids is not None
    assert profile.topk_ids.tolist() == [[[1, 2], [1, 0]], [[0, 1], [2, 1]], [[2, 0], [2, 0]]]
    assert (profile.top_k, profile.meta["tokens"]) == (2, 3)
    for layer in range(2):
        assert np.bincount(profile.topk_ids[:, layer].ravel(), minlength=3).tolist() == profile.counts[layer].tolist()


def test_per_token_of_uneven_tokens_keeps_the_counts_and_says_so(tmp_path: Path) -> None:
    ids = [[[-1, -1]] * 2, [[0, 1], [2, -1]], [[0, 1], [1, 2]]]
    done = import_statistics([detail(tmp_path / "a.pt", [record(1, 0, ids=ids)])], "sglang")
    assert done.profile.topk_ids is None
    assert done.profile.counts.tolist() == [[1, 1, 1], [1, 2, 1]]
    assert any("per-token ids are not kept" in note for note in done.notes)


def test_moved_experts_are_mentioned(tmp_path: Path) -> None:
    counts = [[1, 1, 1, 1]] * 3
    other = [[1, 0, 2, 0], [0, 1, 2, 0], [2, 1, 0, 2]]
    files = [detail(tmp_path / "a.pt", [record(1, 0, counts=counts)])]
    files.append(detail(tmp_path / "b.pt", [record(2, 0, counts=counts)], other))
    assert any("moved" in note for note in import_statistics(files, "sglang").notes)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_selection_is_counted_once(tmp_path: Path, data: st.DataObject) -> None:
    layers, experts, slots, ranks = 3, 5, data.draw(st.integers(5, 9)), data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    table = np.stack([rng.permutation(np.arange(slots) % experts) for _ in range(layers)])
    true = np.zeros((layers, experts), dtype=np.int64)
    files = []
    for rank in range(ranks):
        records = []
        for number in range(3):
            count = rng.integers(0, 50, (layers, slots))
            for layer in range(layers):
                for slot in range(slots):
                    true[layer, table[layer, slot]] += count[layer, slot]
            records.append(record(number, rank, counts=count))
        files.append(detail(tmp_path / f"{rank}.pt", records, table))
    profile = import_statistics(files, "sglang", ImportOptions(windows=2)).profile
    assert profile.counts.tolist() == true.tolist()
    assert profile.series is not None
    assert profile.series.shape == (2, layers, experts)
    assert profile.series.sum(0).tolist() == true.tolist()


class Bomb:
    """Unpickled without care, this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"logical_count": Bomb(tmp_path / "ran")}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"logical_count": Bomb(tmp_path / "ran")}, protocol=2))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(InputError, match=rf"{name}: it is refused: it holds pickled content beyond plain tensors"):
            import_statistics([tmp_path / name], "sglang")
    assert not (tmp_path / "ran").exists()


def test_wrong_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    counts = [[1, 1, 1, 1]] * 3
    good = detail(tmp_path / "good.pt", [record(1, 0, counts=counts)])
    cases: list[tuple[list[Path], str]] = [
        ([tmp_path / "none.pt"], "no such file"),
        ([good, good], "given twice"),
        (
            [good, detail(tmp_path / "same.pt", [record(1, 0, counts=counts)])],
            "forward pass 1 of rank 0 is recorded twice",
        ),
        ([good, stat(tmp_path / "stat.pt", [[[1, 2, 3]] * 3])], "the kind of dump: stat, but per_pass in good.pt"),
        ([good, detail(tmp_path / "other.pt", [], [[0, 1], [1, 0], [0, 1]])], r"layers x experts: \(3, 2\)"),
        ([stat(tmp_path / "empty.pt", np.zeros((2, 1, 2)))], "no selection"),
        ([stat(tmp_path / "negative.pt", [[[1, -2]]])], "outside 0"),
        ([stat(tmp_path / "flat.pt", [1, 2])], "1 axes, 2 or 3"),
        ([detail(tmp_path / "no.pt", [])], "no forward pass"),
        ([detail(tmp_path / "narrow.pt", [record(1, 0, counts=[[1, 1]] * 3)])], "is (3, 2)|is \\(3, 2\\)"),
        ([detail(tmp_path / "map.pt", [], [[0, 7]])], "outside 0..1"),
    ]
    lying = record(1, 0, ids=[[[0, 1]]] * 3)
    lying["global_physical_count"] = lying["global_physical_count"] + 1
    cases.append(([detail(tmp_path / "lying.pt", [lying])], "disagree"))
    high = record(1, 0, ids=[[[0, 1]]] * 3)
    high["topk_ids_of_layer"] = high["topk_ids_of_layer"] + 3
    cases.append(([detail(tmp_path / "high.pt", [high])], r"outside -1..3"))
    torch.save({"weights": torch.ones(2)}, tmp_path / "model.pt")
    cases.append(([tmp_path / "model.pt"], "not a dump of SGLang's .* holds weights"))
    torch.save({"logical_count": torch.ones(1, 1, 2)}, tmp_path / "float.pt")
    cases.append(([tmp_path / "float.pt"], "integers are needed"))
    torch.save({"logical_count": torch.ones(1, dtype=torch.int32).expand(2**20, 2**10, 2**10)}, tmp_path / "wide.pt")
    cases.append(([tmp_path / "wide.pt"], "more than the file holds"))
    (tmp_path / "text.pt").write_text("hello")
    cases.append(([tmp_path / "text.pt"], "not a readable .pt"))
    (tmp_path / "folder").mkdir()
    cases.append(([tmp_path / "folder"], "no .pt files"))
    for files, reason in cases:
        with pytest.raises(InputError, match=reason):
            import_statistics(files, "sglang")
    with pytest.raises(InputError, match="--top-k 3 contradicts the files, which say 2"):
        import_statistics(
            [detail(tmp_path / "k.pt", [record(1, 0, ids=[[[0, 1]]] * 3)])], "sglang", ImportOptions(top_k=3)
        )


@pytest.mark.parametrize("kind", ["stat", "per_token"])
@pytest.mark.parametrize("inside", [False, True])
@FUZZ
@given(data=st.data())
def test_damaged_bytes_are_read_or_refused(tmp_path: Path, kind: str, inside: bool, data: st.DataObject) -> None:
    path = tmp_path / "a.pt"
    if kind == "stat":
        stat(path, [[[1, 2], [3, 4]]])
    else:
        detail(path, [record(1, 0, ids=[[[0, 1]]] * 3)])
    if inside:  # damage the pickle, under whole checksums
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, data.draw(damaged(part)) if name.endswith("data.pkl") else part)
    else:
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    unless_refused(lambda: import_statistics([path], "sglang"))


VALUES = st.recursive(
    st.none()
    | st.integers(-3, 2**40)
    | st.text(max_size=3)
    | st.builds(
        lambda shape, low, dtype: torch.full(shape, low, dtype=dtype),
        st.lists(st.integers(0, 4), max_size=4),
        st.integers(-2, 5),
        st.sampled_from([torch.int32, torch.int64, torch.float32, torch.bool, torch.uint8]),
    ),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=4,
)
RECORDS = st.lists(
    st.dictionaries(
        st.sampled_from(["forward_pass_id", "rank", "gatherer_key", "global_physical_count", "topk_ids_of_layer"]),
        VALUES,
        max_size=5,
    ),
    max_size=3,
)


@FUZZ
@given(
    document=st.fixed_dictionaries(
        {},
        optional={
            "logical_count": VALUES,
            "records": RECORDS | VALUES,
            "last_physical_to_logical_map": VALUES | st.just(torch.tensor(MAP)),
        },
    )
)
def test_strange_documents_are_read_or_refused(tmp_path: Path, document: dict[str, Any]) -> None:
    torch.save(document, tmp_path / "a.pt")
    unless_refused(lambda: import_statistics([tmp_path / "a.pt"], "sglang"))
