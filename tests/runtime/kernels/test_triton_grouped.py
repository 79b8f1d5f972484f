"""The Triton kernels against torch and the formats: on a GPU, or on the CPU in Triton's interpreter.

TRITON_INTERPRET=1 pytest -m gpu tests/runtime/kernels/test_triton_grouped.py (with triton installed) needs no GPU.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core_models import random_slots
from equipoise.formats import get_format, quantize_rows
from equipoise.runtime.experts import Slots, plain_forward
from equipoise.runtime.kernels import grouped, slotwise
from equipoise.runtime.slots import SlotTable
from equipoise.types import LayerPlan
from runtime.kernels.test_grouped_forward import FOUND, cases, layers_of
from tiny import EXPERTS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="no GPU, and not TRITON_INTERPRET=1"),
]


@pytest.fixture(scope="module")
def kernels() -> Any:
    pytest.importorskip("triton")
    from equipoise.runtime.kernels import triton_grouped

    if INTERPRETED:
        _teach_bfloat16()
    return triton_grouped


def _teach_bfloat16() -> None:
    """Triton's interpreter holds bfloat16 as 16-bit integers, and takes them for that in products and casts."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    own, own_cast = InterpreterBuilder.create_dot, InterpreterBuilder.create_si_to_fp

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast(self: Any, x: Any, kind: Any) -> Any:
        if kind.scalar != tl.bfloat16:
            return own_cast(self, x, kind)
        return TensorHandle((x.data.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16), tl.bfloat16)

    InterpreterBuilder.create_si_to_fp = cast
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: own(self, widened(a), widened(b), *rest)


def pool_of(
    precision: str, slots: int, n: int, k: int, out_axis: int, draw: torch.Generator
) -> dict[str, torch.Tensor]:
    shape = (slots, n, k) if out_axis == -2 else (slots, k, n)
    weight = (torch.randn(shape, generator=draw) / k**0.5).bfloat16()
    encoded = [get_format(precision).encode(w, out_axis) for w in weight]
    return {suffix: torch.stack([one[suffix] for one in encoded]).to(DEVICE) for suffix in encoded[0]}


def check_linear(
    kernels: Any, precision: str, counts: list[int], n: int, k: int, out_axis: int, gather: bool, seed: int
) -> None:
    """One pool between two others of which no row may be touched."""
    draw = torch.Generator().manual_seed(seed)
    before, after = seed % 3, seed % 2
    ends = torch.tensor([before, *counts]).cumsum(0).to(torch.int32)
    rows = int(ends[-1]) + after
    total = rows if not gather else max(1, rows // 2)
    x = torch.randn(total, k, generator=draw).bfloat16().to(DEVICE)
    tokens = torch.randint(0, total, (rows,), generator=draw).to(torch.int32).to(DEVICE) if gather else None
    stored = pool_of(precision, len(counts), n, k, out_axis, draw)
    out = torch.full((rows, n), 77.0, dtype=torch.bfloat16, device=DEVICE)
    wanted = out.clone()
    q, scale = quantize_rows(x)
    int8 = precision == "int8"
    kernels.linear(
        q if int8 else x, stored[""], out, ends.to(DEVICE), 1, out_axis=out_axis, tokens=tokens,
        x_scale=scale if int8 else None, scale=stored.get("_scale"),
    )  # fmt: skip
    seen: Any = slotwise.Quantized(q, scale) if int8 else x
    if tokens is not None:
        seen = seen.take(tokens.long()) if int8 else x[tokens.long()]
    slotwise.linear(seen, stored, precision, out_axis, ends.tolist(), wanted)
    if int8 and not INTERPRETED:  # integers are exact, and both round in the same places
        assert torch.equal(out, wanted)
    elif int8:  # the interpreter cuts float32 to bfloat16 where a GPU rounds, here twice
        torch.testing.assert_close(out.float(), wanted.float(), rtol=2.1 * 2**-7, atol=1e-6)
    else:
        torch.testing.assert_close(out.float(), wanted.float(), rtol=0.02, atol=0.02)
    assert (out[:before] == 77).all()
    assert (out[rows - after :] == 77).all()


FORMS = ("int8", "int8_weight_only", "original", "float16")


@pytest.mark.parametrize("precision", FORMS)
@pytest.mark.parametrize("out_axis", [-2, -1])
@pytest.mark.parametrize(
    ("counts", "n", "k"),
    [([1], 64, 256), ([0, 5, 0, 33, 1], 96, 32), ([40, 0, 70], 128, 128), ([130, 300, 0], 136, 72), ([0, 0], 16, 16)],
)
def test_a_pool_of_slots(kernels: Any, precision: str, out_axis: int, counts: list[int], n: int, k: int):
    for gather in (False, True) if INTERPRETED else (len(counts) % 2 == 0,):  # on a GPU each is compiled
        check_linear(kernels, precision, counts, n, k, out_axis, gather, seed=5)


@pytest.mark.skipif(not INTERPRETED, reason="every shape would be compiled")
@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.lists(st.integers(0, 60), min_size=1, max_size=20),
    st.integers(1, 20).map(lambda n: 8 * n),
    st.integers(1, 40).map(lambda k: 8 * k),
    st.sampled_from([-2, -1]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_pools_of_any_shape(
    kernels: Any, precision: str, counts: list[int], n: int, k: int, out_axis: int, gather: bool, seed: int
):
    check_linear(kernels, precision, counts, n, k, out_axis, gather, seed)


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 32), (5, 72), (7, 2048), (2, 5000)])
def test_rows_are_rounded_as_the_format_says(kernels: Any, rows: int, width: int):
    draw = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=draw).bfloat16() * torch.logspace(-3, 3, rows)[:, None].bfloat16()
    x[0, :3] = torch.tensor([1.0, -127.0, 63.5])
    q, scale = kernels.quantize(x.to(DEVICE))
    wanted, wanted_scale = quantize_rows(x)
    assert (q.cpu().int() - wanted.int()).abs().max() <= (0 if INTERPRETED else 1)
    torch.testing.assert_close(scale.cpu(), wanted_scale, rtol=1e-6, atol=0)


def test_rows_that_cannot_be_rounded(kernels: Any):
    x = torch.ones(5, 40, dtype=torch.bfloat16)
    x[0] = 0
    x[1, 7] = torch.nan
    x[2, 7] = torch.inf
    x[3] = 1e-39
    q, scale = kernels.quantize(x.to(DEVICE))
    assert scale.cpu().isfinite().flatten().tolist() == [True, False, False, True, True]
    assert not q[:4].any()
    assert (q[4] == 127).all()


def slots_of(seed: int) -> Any:
    slots = object.__new__(Slots)
    slots.table = SlotTable(LayerPlan(0, "layer", EXPERTS, tuple(random_slots(seed))))
    return slots


@pytest.mark.parametrize("seed", range(6))
def test_small_batches_are_sorted_alike(kernels: Any, seed: int):
    slots, draw = slots_of(seed), torch.Generator().manual_seed(seed)
    for tokens, k in ((1, 1), (1, 2), (5, 3), (16, 8), (64, 2)):
        index = torch.randint(0, EXPERTS + 1, (tokens, k), generator=draw).to(DEVICE)
        got, wanted = grouped.dispatch(slots, index, kernels), grouped.dispatch(slots, index)
        for name in ("place", "tokens", "position", "ends"):
            assert torch.equal(getattr(got, name).long(), getattr(wanted, name).long()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_combined(kernels: Any, dtype: torch.dtype):
    draw = torch.Generator().manual_seed(1)
    y = torch.randn(12, 72, generator=draw).bfloat16()
    y[10:] = torch.nan  # dropped
    place = torch.from_numpy(np.random.default_rng(0).permutation(12))
    weights = torch.rand(4, 3, generator=draw).to(dtype)
    weights.view(-1)[place >= 10] = torch.nan
    ends = torch.tensor([3, 3, 10], dtype=torch.int32)
    got = kernels.combine(y.to(DEVICE), weights.to(DEVICE), place.to(DEVICE), ends.to(DEVICE)).cpu()
    rows = (y[place].float() * weights.reshape(-1, 1).float()).masked_fill(place[:, None] >= 10, 0)
    torch.testing.assert_close(got.float(), rows.view(4, 3, -1).sum(1), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("wanted", ["triton", "triton_all"])
@pytest.mark.parametrize("family", FOUND)
@torch.no_grad()
def test_whole_layers(kernels: Any, family: str, wanted: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(grouped.VARIABLE, wanted)
    layer = layers_of(family, DEVICE)[0]
    slots = layer.experts.equipoise_slots
    for case in cases(layer, DEVICE):
        got, plain = grouped.forward(slots, *case), plain_forward(slots, *case)
        assert got.isfinite().all()
        assert (got - plain).float().norm() <= 0.03 * plain.float().norm()
