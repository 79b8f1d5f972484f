"""Formats: sizes known beforehand are the sizes stored, rounding errors are within their bound, overflow is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from equipoise.errors import InputError
from equipoise.formats import FORMATS, get_format
from equipoise.types import PRECISIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_every_precision_has_a_format():
    assert set(FORMATS) == set(PRECISIONS)
    assert all(get_format(name).name == name for name in PRECISIONS)
    with pytest.raises(KeyError, match="'int4' is not one of original, int8, int8_weight_only, float16"):
        get_format("int4")


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_axis", [-2, -1])
@pytest.mark.parametrize("shape", [(3, 5), (1, 7), (7, 1), (2, 3, 5), (4, 2, 1, 6)])
def test_parts_are_what_encode_stores(name: str, dtype: torch.dtype, out_axis: int, shape: tuple[int, ...]):
    form, w = get_format(name), weight(shape, dtype)
    parts, stored = form.parts(shape, out_axis, dtype), form.encode(w, out_axis)
    assert [part.suffix for part in parts] == list(stored)
    for part in parts:
        tensor = stored[part.suffix]
        assert tuple(tensor.shape) == part.shape
        assert tensor.dtype == part.dtype
        assert tensor.numel() * tensor.element_size() == part.nbytes
    again = form.decode(stored, out_axis, dtype)
    assert again.shape == w.shape
    assert again.dtype == dtype


def test_bytes_of_a_large_expert_without_a_tensor():
    shape = (14336, 4096)
    (whole,) = get_format("original").parts(shape, -2, torch.bfloat16)
    (half,) = get_format("float16").parts(shape, -2, torch.float32)
    values, scales = get_format("int8").parts(shape, -2, torch.bfloat16)
    assert whole.nbytes == half.nbytes == 2 * 14336 * 4096
    assert (values.nbytes, scales.nbytes) == (14336 * 4096, 4 * 14336)
    assert get_format("int8").parts(shape, -1, torch.bfloat16)[1].nbytes == 4 * 4096


@pytest.mark.parametrize("dtype", DTYPES)
def test_original_is_the_weight(dtype: torch.dtype):
    form, w = get_format("original"), weight((4, 6), dtype)
    assert torch.equal(form.decode(form.encode(w, -2), -2, dtype), w)


WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=3, max_side=6),
    elements=st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-2, 2, width=32) | st.just(0.0),
)


@settings(deadline=None, max_examples=150)
@given(WEIGHTS, st.sampled_from([-2, -1]))
def test_int8_error_is_at_most_half_a_scale(values: np.ndarray, out_axis: int):
    form, w = get_format("int8"), torch.from_numpy(values)
    stored = form.encode(w, out_axis)
    scale = stored["_scale"].double()
    again = stored[""].double() * scale
    # Half a scale, and what rounding the scale to float32 adds.
    bound = scale * 0.5 + w.double().abs() * 2.0**-23
    assert bool(((again - w.double()).abs() <= bound).all())
    assert torch.equal(form.decode(stored, out_axis, torch.float32), (stored[""].float() * stored["_scale"]))
    assert stored[""].abs().max() <= 127  # -128 would make the grid uneven


@settings(deadline=None, max_examples=60)
@given(WEIGHTS)
def test_transposed_layout_is_the_same_weight(values: np.ndarray):
    """[in, out] with out_axis -1 stores the transpose of what [out, in] with out_axis -2 stores."""
    form, w = get_format("int8"), torch.from_numpy(values)
    plain, turned = form.encode(w, -2), form.encode(w.transpose(-1, -2), -1)
    assert torch.equal(plain[""], turned[""].transpose(-1, -2))
    assert torch.equal(plain["_scale"], turned["_scale"].transpose(-1, -2))


def test_int8_scales_are_of_output_channels():
    w = weight((5, 64))
    w[3] *= 1000
    scale = get_format("int8").encode(w, -2)["_scale"]
    assert torch.allclose(scale[:, 0], w.abs().amax(1) / 127)
    # One loud channel costs the others nothing.
    quiet = get_format("int8").encode(w[[0, 1, 2, 4]], -2)["_scale"]
    assert torch.equal(quiet, scale[[0, 1, 2, 4]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_zero_channels_stay_zero(dtype: torch.dtype):
    w = weight((4, 8), dtype)
    w[1] = 0
    stored = get_format("int8").encode(w, -2)
    assert stored["_scale"][1] == 1
    assert not get_format("int8").decode(stored, -2, dtype)[1].any()
    assert get_format("int8").decode(stored, -2, dtype)[0].any()


def test_int8_keeps_the_largest_of_each_channel():
    stored = get_format("int8").encode(weight((6, 40)), -2)
    assert (stored[""].abs().amax(1) == 127).all()


def test_int8_of_stacked_slots_is_slot_by_slot():
    w = weight((3, 5, 8))
    together = get_format("int8").encode(w, -2)
    for i in range(3):
        alone = get_format("int8").encode(w[i], -2)
        assert all(torch.equal(together[suffix][i], alone[suffix]) for suffix in alone)


@settings(deadline=None, max_examples=100)
@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(-65504, 65504, width=32)))
def test_float16_rounds_to_nearest(values: np.ndarray):
    form = get_format("float16")
    again = form.decode(form.encode(torch.from_numpy(values), -2), -2, torch.float32).numpy()
    error = np.abs(again.astype(np.float64) - values)
    assert (error <= np.maximum(np.abs(values) * 2.0**-11, 2.0**-25)).all()


@pytest.mark.parametrize("bad", [65520.0, -1e30])
def test_float16_overflow_is_refused(bad: float):
    w = weight((3, 4))
    w[1, 2] = bad
    with pytest.raises(InputError, match="does not fit float16; use int8"):
        get_format("float16").encode(w, -2)
    get_format("int8").encode(w, -2)


@pytest.mark.parametrize("name", ["int8", "float16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(name: str, bad: float):
    w = weight((3, 4))
    w[2, 0] = bad
    with pytest.raises(InputError, match="NaN or inf"):
        get_format(name).encode(w, -2)
