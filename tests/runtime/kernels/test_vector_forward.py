"""Products on plain weights: against float64, shared out over threads, and where the path is taken."""

from __future__ import annotations

import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core_models import ANY, random_slots
from equipoise.models import find_layers
from equipoise.runtime import apply, packing
from equipoise.runtime.experts import plain_forward, slots_forward
from equipoise.runtime.kernels import dots, few_rows, rows, vector
from families.families_support import make_plan
from runtime.kernels.kernel_cases import KINDS, balanced, batch
from tiny import FAMILIES

pytestmark = pytest.mark.skipif(not vector.suits_processor(), reason="not an x86 processor")


@pytest.fixture(autouse=True)
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "can_pack", lambda _: False)
    monkeypatch.setattr(few_rows, "MOST", -1)


@given(
    st.lists(st.integers(1, 11), min_size=1, max_size=4),
    st.integers(1, 40),
    st.integers(1, 150),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_products_of_any_size(counts: list[int], width: int, out: int, int8: bool, turned: bool, seed: int):
    """All layouts, odd rows, channels and inputs; segments in any order of the slots; rows of nobody untouched."""
    draw = torch.Generator().manual_seed(seed)
    slots = len(counts) + 2
    shape = (slots, width, out) if turned else (slots, out, width)
    drawn = torch.randn(shape, generator=draw)
    stored = (40 * drawn).round().clamp(-127, 127).to(torch.int8) if int8 else drawn.bfloat16()
    place = torch.randperm(slots, generator=draw)[: len(counts)]
    begin = np.concatenate([[1], 1 + np.cumsum(counts)[:-1]])
    x = torch.randn(sum(counts) + 2, width, generator=draw)
    y = torch.full((len(x), out), -7.0)
    kernel, tile = (dots.by_columns, dots.WIDE_TILE) if turned else (dots.by_rows, dots.TILE)
    plain = stored.numpy() if int8 else rows.bits(stored)
    where = place.numpy(), begin.astype(np.int64), np.array(counts, np.int64)
    total = len(counts) * -(-out // tile)
    for first, last in pairwise([0, total // 3, total // 2, total]):
        kernel(x.numpy(), plain, *where, y.numpy(), first, last)
    for p, b, n in zip(*(part.tolist() for part in where), strict=True):
        weight = stored[p].double() if turned else stored[p].double().t()
        wanted = x[b : b + n].double() @ weight
        bound = 1e-6 * (x[b : b + n].double().abs() @ weight.abs()) + 1e-30
        assert bool(((y[b : b + n].double() - wanted).abs() <= bound).all())
    assert bool((y[[0, -1]] == -7.0).all())


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("precision", ["original", "int8"])
@torch.no_grad()
def test_integers_and_originals_are_the_formats_own_bits(family: str, precision: str):
    """Integers are summed exactly; of 16-bit weights the sums of these sizes round alike."""
    for layer in find_layers(balanced(family, (precision,))):
        slots = layer.experts.equipoise_slots
        for tokens in (1, 3, 50):
            case = batch(layer, tokens)
            got, wanted = slots_forward(slots, *case), plain_forward(slots, *case)
            if precision == "int8":
                assert torch.equal(got, wanted)
            else:
                torch.testing.assert_close(got, wanted, rtol=0.01, atol=0.01 * float(wanted.abs().max()))


@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_a_float32_model_runs_here_too(family: str):
    for precision in few_rows.PRECISIONS:
        for layer in find_layers(balanced(family, (precision,), torch.float32)):
            slots = layer.experts.equipoise_slots
            for tokens in (1, 3, 50):
                case = batch(layer, tokens)
                assert vector.is_ready(slots, case[0])
                got, wanted = slots_forward(slots, *case), plain_forward(slots, *case)
                assert got.dtype == torch.float32
                if precision == "int8":
                    assert torch.equal(got, wanted)
                else:
                    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.integers(2, 9))
def test_shares_cover_every_tile_once(counts: list[int], threads: int):
    seen: list[tuple[int, int]] = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        vector._share_out(lambda first, last: seen.append((first, last)), np.array(counts))
    finally:
        torch.set_num_threads(before)
    assert sorted(tile for first, last in seen for tile in range(first, last)) == list(range(len(counts)))
    assert len(seen) <= threads


@torch.no_grad()
def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch):
    layer = find_layers(balanced("mixtral"))[0]
    slots = layer.experts.equipoise_slots
    case = batch(layer, 60)
    alone = slots_forward(slots, *case)
    monkeypatch.setattr(vector, "SHARED_FROM", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(slots_forward(slots, *case), alone)
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_thread_is_the_callers(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def run(first: int, last: int) -> None:
        if first:
            raise MemoryError("no room")

    try:
        with pytest.raises(MemoryError, match="no room"):
            vector._share_out(run, np.full(8, 5))
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_where_it_is_taken():
    slots = find_layers(balanced("mixtral"))[0].experts.equipoise_slots
    assert vector.is_ready(slots, torch.zeros(1, 8, dtype=torch.bfloat16))
    for other in (torch.float32, torch.float16):
        assert not vector.is_ready(slots, torch.zeros(1, 8, dtype=other))
    assert not vector.is_ready(slots, torch.zeros(1, 8, dtype=torch.bfloat16, device="meta"))
    wide = find_layers(balanced("mixtral", dtype=torch.float32))[0].experts.equipoise_slots
    assert vector.is_ready(wide, torch.zeros(1, 8))
    assert not vector.is_ready(wide, torch.zeros(1, 8, dtype=torch.bfloat16))
    half = find_layers(balanced("mixtral", ("float16",)))[0].experts.equipoise_slots
    assert not vector.is_ready(half, torch.zeros(1, 8, dtype=torch.bfloat16))


def test_what_runs_is_said(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="equipoise"):
        balanced("mixtral")
        balanced("mixtral", dtype=torch.float32)
        apply(wide := FAMILIES["mixtral"](), make_plan(wide, lambda row: random_slots(row, ANY)))
    first, second, third = caplog.messages
    assert "on float32 vector instructions: this processor" in first
    assert "on float32 vector instructions: the model" in second
    assert "in plain operations" in third


@torch.no_grad()
def test_a_model_generates_what_its_plain_arithmetic_does(monkeypatch: pytest.MonkeyPatch):
    model = balanced("qwen2_moe", ("int8",))
    ids = torch.randint(3, 120, (2, 7), generator=torch.Generator().manual_seed(0))
    found = model.generate(ids, max_new_tokens=6, do_sample=False)
    monkeypatch.setattr(vector, "is_ready", lambda *_: False)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), found)
