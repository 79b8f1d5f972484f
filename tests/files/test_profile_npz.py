"""Profiles as .npz: round trips, every check, and damaged files that must never pass for profiles."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core_cases import example_profile, one_line, profiles, same_profile
from equipoise.errors import InputError
from equipoise.files import load_profile, profile_hash, save_plan, save_profile
from equipoise.files.plan_json import load_plan
from equipoise.files.profile_npz import check_profile
from equipoise.options import PlanOptions
from equipoise.planning import plan
from equipoise.types import Profile

FILE = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FILE
@given(profiles())
def test_round_trip_through_a_file(tmp_path: Path, profile: Profile):
    save_profile(profile, tmp_path / "p.npz")
    again = load_profile(tmp_path / "p.npz")
    assert same_profile(profile, again)
    assert profile_hash(again) == profile_hash(profile)


def test_shape_and_top_k():
    profile = example_profile()
    assert (profile.num_layers, profile.num_experts, profile.top_k) == (2, 4, 2)
    assert dataclasses.replace(profile, meta={}).top_k == 0


def test_hash_is_of_the_contents():
    profile = example_profile()
    first = profile_hash(profile)
    assert profile_hash(example_profile()) == first
    assert profile_hash(dataclasses.replace(profile, meta={**profile.meta, "tokens": 10})) != first
    importance = {name: values.copy() for name, values in profile.importance.items()}
    importance["error"][0, 0] += 1
    assert profile_hash(dataclasses.replace(profile, importance=importance)) != first
    assert profile_hash(dataclasses.replace(profile, series=None)) != first


def stored(profile: Profile | None = None) -> dict[str, np.ndarray]:
    """The arrays of a saved profile."""
    from equipoise.files import profile_npz

    return dict(profile_npz._arrays(profile or example_profile()))


def write(path: Path, arrays: dict[str, Any]) -> Path:
    np.savez(path, **arrays)
    return path


def meta(**changes: Any) -> np.ndarray:
    return np.array(json.dumps({**json.loads(str(stored()["meta"])), **changes}))


COUNTS = example_profile().counts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": COUNTS[0]}, "counts has 1 axes, 2 are needed"),
        ({"counts": np.array(3)}, "counts has 0 axes"),
        ({"counts": np.zeros((0, 4), np.int64)}, "at least one layer and one expert"),
        ({"counts": np.zeros((2, 0), np.int64)}, "at least one layer and one expert"),
        ({"counts": np.where(COUNTS == 0, np.nan, COUNTS)}, "counts holds NaN or inf"),
        ({"counts": COUNTS + 0.5}, "counts holds numbers that are not whole"),
        ({"counts": -COUNTS}, "counts holds negative numbers"),
        ({"counts": COUNTS.astype(np.uint64) + 2**63}, "counts holds numbers of"),
        ({"counts": COUNTS * 1e30}, "counts holds numbers of"),
        ({"counts": COUNTS.astype(str)}, "counts has dtype"),
        ({"counts": COUNTS > 1}, "counts has dtype bool"),
        ({"counts": None}, "it holds pickled arrays"),
        ({"layer_ids": np.arange(3)}, "layer_ids has 3 entries for 2 layers"),
        ({"layer_ids": np.array([-1, 0])}, "layer_ids holds negative"),
        ({"layer_ids": np.array([0, 0]), "layer_names": np.array(["x", "x"])}, "name a layer twice"),
        ({"layer_names": np.array(["a", "b", "c"])}, "layer_names has 3 entries for 2 layers"),
        ({"series": COUNTS[None, :, :3]}, "series has shape (1, 2, 3)"),
        ({"series": COUNTS[None] + 1}, "series does not add up to counts"),
        ({"topk_ids": np.zeros((3, 2), np.int64)}, "topk_ids is int64 (3, 2)"),
        ({"topk_ids": np.zeros((3, 2, 2))}, "topk_ids is float64"),
        ({"topk_ids": np.full((3, 2, 2), 4)}, "topk_ids holds an expert outside 0..3"),
        ({"topk_ids": np.full((3, 2, 2), -1)}, "topk_ids holds an expert outside 0..3"),
        ({"topk_ids": np.zeros((3, 2, 2), np.int64)}, "topk_ids do not add up to counts"),
        ({"importance_error": np.zeros((2, 3))}, "importance_error has shape (2, 3)"),
        ({"importance_error": np.full((2, 4), np.nan)}, "importance_error holds NaN or inf"),
        ({"importance_error": np.full((2, 4), 1e300)}, "importance_error holds numbers beyond float32"),
        ({"importance_error": np.full((2, 4), "x")}, "importance_error has shape"),
        ({"expert_bytes_int4": COUNTS + 1}, "precision 'int4' is not one of"),
        ({"expert_bytes_int8": COUNTS}, "expert_bytes_int8 must be positive"),
        ({"expert_bytes_int8": COUNTS[:1] + 1}, "expert_bytes_int8 must be positive and of shape (2, 4)"),
        ({"meta": np.array("{")}, "meta is not JSON"),
        ({"meta": np.array("[" * 100_000)}, "meta is not JSON"),
        ({"meta": np.array('{"tokens": ' + "1" * 5000 + "}")}, "meta is not JSON"),
        ({"meta": np.array("[1]")}, "meta is not a JSON object"),
        ({"meta": meta(format="other")}, "format is 'other'"),
        ({"meta": meta(version=9)}, "version 9 is not readable"),
        ({"meta": meta(top_k=5)}, "meta top_k is 5"),
        ({"meta": meta(top_k="two")}, "meta top_k is 'two'"),
        ({"meta": meta(top_k=True)}, "meta top_k is True"),
    ],
)
def test_each_wrong_array_is_named(tmp_path: Path, changes: dict[str, Any], message: str):
    path = tmp_path / "p.npz"
    with pytest.raises(InputError) as caught:
        load_profile(write(path, {**stored(), **changes}))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"profile {path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["meta", "counts"])
def test_missing_key(tmp_path: Path, missing: str):
    arrays = stored()
    del arrays[missing]
    with pytest.raises(InputError, match=f"key '{missing}' is missing"):
        load_profile(write(tmp_path / "p.npz", arrays))


def test_pickles_are_never_opened(tmp_path: Path):
    class Opened:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "opened",))

    for name in ("counts", "meta", "extra"):
        array = np.empty((), dtype=object)
        array[()] = Opened()
        with pytest.raises(InputError, match="pickled"):
            load_profile(write(tmp_path / "p.npz", {**stored(), name: array}))
    assert not (tmp_path / "opened").exists()


def test_files_that_are_no_profiles(tmp_path: Path):
    path = tmp_path / "p.npz"
    with pytest.raises(InputError, match="no such profile"):
        load_profile(path)
    for contents in (b"", b"PK", b"PK\x03\x04" + b"\0" * 100, b"counts", b"\x93NUMPY\x01\x00"):
        path.write_bytes(contents)
        with pytest.raises(InputError, match=r"profile .*p\.npz"):
            load_profile(path)
    buffer = io.BytesIO()
    np.save(buffer, COUNTS)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match=r"profile .*p\.npz"):
        load_profile(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("counts.npy", b"no array")
        archive.writestr("meta.npy", b"no array")
    with pytest.raises(InputError, match=r"profile .*p\.npz"):
        load_profile(path)


def test_whole_floats_are_counts(tmp_path: Path):
    again = load_profile(write(tmp_path / "p.npz", {**stored(), "counts": COUNTS.astype(np.float64)}))
    assert again.counts.dtype == np.int64
    assert np.array_equal(again.counts, COUNTS)


def test_layer_without_load_is_no_error():
    counts = COUNTS.copy()
    counts[1] = 0
    checked = check_profile(dataclasses.replace(example_profile(), counts=counts, series=None))
    assert checked.counts[1].sum() == 0
    for options in (PlanOptions(), PlanOptions(preset="paper")):
        assert plan(checked, options).layers[1].is_identity


def still_a_profile(path: Path, profile: Profile) -> None:
    """The rules, written again; and what was accepted can be planned from, or is refused for its sizes."""
    counts, experts = profile.counts, profile.num_experts
    assert counts.dtype == np.int64
    assert counts.min() >= 0
    assert len(profile.layer_ids) == len(counts)
    assert profile.series is None or (profile.series.sum(0) == counts).all()
    assert all(v.shape == counts.shape and np.isfinite(v).all() for v in profile.importance.values())
    assert all(v.shape == counts.shape and v.min() >= 1 for v in profile.expert_bytes.values())
    assert 0 <= profile.top_k <= experts
    try:
        made = plan(profile)
    except InputError as error:
        one_line(error)
        return
    save_plan(made, path)
    assert load_plan(path) == made
    assert made.budget.plan_bytes <= made.budget.limit_bytes


@settings(deadline=None, max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), value=st.integers(0, 255), compressed=st.booleans(), cut=st.booleans())
def test_mutated_bytes(tmp_path: Path, at: int, value: int, compressed: bool, cut: bool):
    """One byte changed, or the end cut off."""
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **stored())
    good = buffer.getvalue()
    at %= len(good)
    path = tmp_path / "p.npz"
    path.write_bytes(good[:at] if cut else good[:at] + bytes([value]) + good[at + 1 :])
    try:
        profile = load_profile(path)
    except InputError as error:
        one_line(error, f"profile {path}")
    else:
        still_a_profile(tmp_path / "plan.json", profile)


JUNK = st.one_of(
    st.integers(-(2**62), 2**62),
    st.floats(),
    st.text(max_size=4),
    st.booleans(),
    st.none(),
    st.lists(st.integers(-3, 300), max_size=9),
    st.lists(st.lists(st.floats(-2, 1e10), min_size=2, max_size=2), max_size=3),
)


@settings(deadline=None, max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_arrays(tmp_path: Path, data: st.DataObject):
    """Arrays replaced, removed, reshaped, one number changed; keys of `meta` replaced."""
    arrays: dict[str, Any] = stored()
    if data.draw(st.booleans(), label="trace"):
        for name in ("series", "expert_bytes_original", "expert_bytes_int8"):
            del arrays[name]
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from([*arrays, "topk_ids", "expert_bytes_float16", "importance_own"]))
        action = data.draw(st.sampled_from(["number", "replace", "remove", "reshape", "dtype", "meta"]))
        array = np.asarray(arrays.get(name, COUNTS))
        if action == "meta":
            keys = ["model", "model_type", "top_k", "dtype", "tokens", "format", "version", "other"]
            arrays["meta"] = meta(**{data.draw(st.sampled_from(keys)): data.draw(JUNK)})
        elif action == "number" and array.size and array.dtype.kind in "if":
            changed = array.copy()
            limit = 2**62 if array.dtype.kind == "i" else 1e38
            number = st.integers(-2, 2**62) if array.dtype.kind == "i" else st.floats(-limit, limit)
            changed.flat[data.draw(st.integers(0, array.size - 1))] = data.draw(number)
            arrays[name] = changed
        elif action == "remove":
            arrays.pop(name, None)
        elif action == "reshape" and array.size:
            arrays[name] = array.reshape(data.draw(st.sampled_from([(-1,), (1, -1), (-1, 1), (*array.shape, 1)])))
        elif action == "dtype" and array.dtype.kind in "iuf":
            arrays[name] = array.astype(data.draw(st.sampled_from(["f2", "f8", "u1", "i2", "u8", "c16", "U9", "?"])))
        else:
            arrays[name] = np.array(data.draw(JUNK))
    try:
        profile = load_profile(write(tmp_path / "p.npz", arrays))
    except InputError as error:
        one_line(error)
    else:
        still_a_profile(tmp_path / "plan.json", profile)
