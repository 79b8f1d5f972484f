"""`profile`: windows add up, sizes are true, and batches that tell nothing are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core_models import batch
from equipoise.errors import InputError
from equipoise.files import load_profile, save_profile
from equipoise.models import find_layers
from equipoise.options import ProfileOptions
from equipoise.profiling import profile
from equipoise.profiling.measure import _windows
from equipoise.runtime import apply, expert_bytes, slot_bytes
from families.families_support import identity_slots, make_plan, reading_routers
from tiny import EXPERTS, FAMILIES


@given(st.integers(1, 40), st.integers(1, 50))
def test_windows_add_up_and_are_even(steps: int, most: int):
    """[steps, 1, 1] ones: each window is the number of steps it took."""
    got = _windows(np.ones((steps, 1, 1), dtype=np.int64), most)[:, 0, 0]
    assert got.sum() == steps
    assert len(got) == min(steps, most)
    assert got.max() - got.min() <= 1


@pytest.mark.parametrize("windows", [1, 3, 64])
def test_series_adds_up_to_counts(windows: int):
    model = FAMILIES["mixtral"]()
    batches = [batch(rows=2, length=8, seed=i) for i in range(7)]
    found = profile(model, batches, ProfileOptions(windows=windows, importance_tokens=0))
    assert found.series is not None
    assert len(found.series) == min(windows, 7)
    assert np.array_equal(found.series.sum(0), found.counts)
    each = [profile(model, [inputs], ProfileOptions(importance_tokens=0)).counts for inputs in batches]
    assert np.array_equal(sum(each), found.counts)
    if windows == 64:
        assert np.array_equal(found.series, each)


def test_counts_are_the_routers(tmp_path):
    model = FAMILIES["qwen3_moe"]()
    inputs = batch(rows=3, length=9)
    with reading_routers(model) as log, torch.no_grad():
        model(**inputs)
    found = profile(model, [inputs], model_name="tiny", data="words")
    assert np.array_equal(found.counts, log.counts(inputs["attention_mask"]))
    assert found.layer_names == tuple(layer.name for layer in find_layers(model))
    assert found.top_k == 2
    assert (found.meta["model"], found.meta["data"]) == ("tiny", "words")
    save_profile(found, tmp_path / "p.npz")
    assert np.array_equal(load_profile(tmp_path / "p.npz").counts, found.counts)


@pytest.mark.parametrize(("dtype", "low"), [(torch.float32, "float16"), (torch.bfloat16, "int8")])
def test_sizes_are_those_of_the_tensors(dtype: torch.dtype, low: str):
    model = FAMILIES["gpt_oss"](dtype=dtype)
    found = profile(model, [batch()])
    total = sum(sum(sizes.values()) for sizes in expert_bytes(model).values())
    assert found.expert_bytes["original"].sum() == total
    assert set(found.expert_bytes) == {"original", "int8", low}
    layer = find_layers(model)[0]
    for name, sizes in found.expert_bytes.items():
        assert (sizes == slot_bytes(layer.layout, name)).all()
        assert sizes.shape == (3, EXPERTS)


def test_profiling_leaves_the_model_as_it_was():
    model = FAMILIES["mixtral"]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    profile(model, [batch()])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_batches_that_tell_nothing():
    model = FAMILIES["mixtral"]()
    inputs = batch()
    with pytest.raises(InputError, match="no batch"):
        profile(model, [])
    with pytest.raises(InputError, match="all padding"):
        profile(model, [{**inputs, "attention_mask": torch.zeros_like(inputs["attention_mask"])}])
    with pytest.raises(InputError, match="attention_mask"):
        profile(model, [{"input_ids": inputs["input_ids"]}])
    with pytest.raises(InputError, match="input_ids"):
        profile(model, [{"attention_mask": inputs["attention_mask"]}])


def test_a_balanced_model_is_refused():
    model = FAMILIES["mixtral"]()
    apply(model, make_plan(model, identity_slots))
    with pytest.raises(InputError, match="balanced already"):
        profile(model, [batch()])
