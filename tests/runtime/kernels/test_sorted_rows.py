"""The forward on a CPU against the formats' plain arithmetic, on every path that there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.models import find_layers
from equipoise.runtime import packing
from equipoise.runtime.experts import plain_forward, slots_forward
from equipoise.runtime.kernels import few_rows, onednn, sorted_rows, vector
from equipoise.runtime.kernels.packed import can_pack
from runtime.kernels.kernel_cases import KINDS, balanced, batch
from tiny import EXPERTS


@pytest.fixture(params=["packed", "vector", "few rows"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that computes the products."""
    if request.param == "packed":
        if not (can_pack(torch.int8) and can_pack(torch.bfloat16)):
            pytest.skip("no matrix instructions on this processor")
        return onednn
    if not vector.suits_processor():
        pytest.skip("not an x86 processor")
    monkeypatch.setattr(packing, "can_pack", lambda _: False)
    if request.param == "vector":
        monkeypatch.setattr(few_rows, "MOST", -1)
    return vector


@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_it_computes_what_the_formats_say(family: str, path: Any):
    for layer in find_layers(balanced(family)):
        slots = layer.experts.equipoise_slots
        for tokens in (1, 7, 90):
            hidden, index, weights = batch(layer, tokens)
            assert path.is_ready(slots, hidden)
            got, wanted = slots_forward(slots, hidden, index, weights), plain_forward(slots, hidden, index, weights)
            assert got.dtype == torch.bfloat16
            assert (got - wanted).float().norm() <= 0.01 * wanted.float().norm()


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 60))
@settings(deadline=None)
def test_groups_hold_every_row_once(counts: list[int], limit: int):
    groups = sorted_rows.groups(counts, limit)
    assert [(s.place, s.count) for segments, _ in groups for s in segments] == [
        (place, count) for place, count in enumerate(counts) if count
    ]
    for segments, total in groups:
        assert [s.begin for s in segments] == [sum(t.count for t in segments[:i]) for i in range(len(segments))]
        assert total == sum(s.count for s in segments)
        assert total <= limit or len(segments) == 1


@torch.no_grad()
def test_groups_change_nothing(monkeypatch: pytest.MonkeyPatch):
    layer = find_layers(balanced("mixtral", ("int8",)))[0]
    case = batch(layer, 60)
    whole = slots_forward(layer.experts.equipoise_slots, *case)
    monkeypatch.setattr(sorted_rows, "GROUP_BYTES", 1)
    assert torch.equal(slots_forward(layer.experts.equipoise_slots, *case), whole)


@torch.no_grad()
def test_int8_rows_do_not_depend_on_their_batch():
    layer = find_layers(balanced("mixtral", ("int8",)))[0]
    slots = layer.experts.equipoise_slots
    for slot in slots.table.rerouted([[s] for s in _first_slots(slots.table)]).pools:
        assert slot == "int8"
    hidden, index, weights = batch(layer, 40)
    # Every slot of an expert holds the same integers, so whichever takes a row gives the same bits.
    together = slots_forward(slots, hidden, index, weights)
    alone = torch.cat(
        [slots_forward(slots, hidden[t : t + 1], index[t : t + 1], weights[t : t + 1]) for t in range(len(hidden))]
    )
    assert torch.equal(together, alone)


def _first_slots(table: Any) -> list[int]:
    first: dict[int, int] = {}
    for s, slot in enumerate(table.layer.slots):
        first.setdefault(slot.expert, s)
    return [first[e] for e in range(table.num_experts)]


@torch.no_grad()
def test_a_damaged_token_stays_alone():
    layer = find_layers(balanced("mixtral"))[0]
    slots = layer.experts.equipoise_slots
    hidden, index, weights = batch(layer, 30)
    index.clamp_(max=EXPERTS - 1)
    clean = slots_forward(slots, hidden, index, weights)
    hidden[4, 3] = float("nan")
    found = slots_forward(slots, hidden, index, weights)
    others = torch.arange(30) != 4
    assert torch.isnan(found[4]).all()
    assert torch.isfinite(found[others]).all()
    torch.testing.assert_close(found[others], clean[others], rtol=0.02, atol=0.02)


@torch.no_grad()
def test_every_expert_chosen_and_none():
    layer = find_layers(balanced("mixtral"))[0]
    slots = layer.experts.equipoise_slots
    hidden, _, _ = batch(layer, 5)
    everyone = torch.arange(EXPERTS).expand(5, EXPERTS)  # k = E
    weights = torch.full((5, EXPERTS), 1 / EXPERTS)
    got, wanted = slots_forward(slots, hidden, everyone, weights), plain_forward(slots, hidden, everyone, weights)
    assert (got - wanted).float().norm() <= 0.01 * wanted.float().norm()
    assert not slots_forward(slots, hidden, torch.full((5, 2), EXPERTS), torch.ones(5, 2)).any()
    nothing = slots_forward(slots, hidden[:0], everyone[:0], weights[:0])
    assert nothing.shape == (0, hidden.shape[1])


def test_gradients_are_refused_when_they_are_asked_for():
    model = balanced("mixtral")
    ids = torch.randint(3, 120, (1, 6))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    logits = model(input_ids=ids).logits
    assert torch.equal(logits, wanted)
    with pytest.raises(RuntimeError, match="for inference"):
        logits.sum().backward()
