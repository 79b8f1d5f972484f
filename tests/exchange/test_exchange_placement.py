"""From a plan to a placement: what the engines cannot honour is refused, dropped by request, or filled up."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exchange_cases import NOTES_LAYER, layer_plan, plan_of, plans
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import InputError
from equipoise.exchange import ExportOptions, export_plan
from equipoise.exchange.placement import Placement, check_placement, from_plan
from equipoise.planning import plan as make_plan
from equipoise.types import LayerPlan, Plan, Profile, Slot

ENGINES = ["sglang", "trtllm", "vllm-ascend"]


def loads(plan: Plan, counts: np.ndarray) -> Profile:
    return Profile(counts=counts, layer_ids=np.array([layer.layer for layer in plan.layers]), meta={})


@settings(max_examples=60, deadline=None)
@given(plans())
def test_columns_of_a_rank_are_its_slots(plan: Plan) -> None:
    placement = from_plan(plan, "sglang", plan.ranks, False, None)
    size = placement.slots // plan.ranks
    for row, layer in zip(placement.experts, plan.layers, strict=True):
        for rank in range(plan.ranks):
            own = sorted(row[rank * size : (rank + 1) * size])
            assert own == sorted(s.expert for s in layer.slots if s.rank == rank)
        assert set(row) == set(range(plan.model.num_experts))
    assert placement.redundant == placement.slots - plan.model.num_experts >= 0
    assert (placement.lost_precisions, placement.lost_shares, placement.added) == (0, 0, 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_mixed_precision_is_refused_unless_only_the_placement_is_wanted(engine: str) -> None:
    plan = plan_of([layer_plan(3, NOTES_LAYER, 4, "int8")], 2)
    with pytest.raises(InputError, match=rf"layer 3 has 2 of 6 slots in int8: {engine} runs one precision") as caught:
        from_plan(plan, engine, None, False, None)
    assert "--placement-only" in str(caught.value)
    placement = from_plan(plan, engine, None, True, None)
    assert placement.lost_precisions == 2
    assert placement.experts.tolist() == [[0, 1, 2, 0, 1, 3]]


def test_unequal_shares_are_refused_unless_only_the_placement_is_wanted() -> None:
    layer = layer_plan(0, NOTES_LAYER, 4)
    slots = tuple(dataclasses.replace(s, share=(0.7, 0.3)[s.rank]) if s.expert == 1 else s for s in layer.slots)
    plan = plan_of([dataclasses.replace(layer, slots=slots)], 2)
    with pytest.raises(InputError, match="layer 0 has 2 slots with unequal shares"):
        from_plan(plan, "trtllm", None, False, None)
    assert from_plan(plan, "trtllm", None, True, None).lost_shares == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_a_plan_with_merged_slots_is_refused_and_one_with_even_shares_is_taken(engine: str) -> None:
    counts = np.array([[4000, 90, 80, 70, 60, 50, 40, 30], [4000, 10, 10, 10, 10, 10, 10, 900]])
    head = Profile(counts, np.arange(2), {})
    made = make_plan(head, ranks=4, slots=16, max_quantized=0.0, budget=2.0)
    made = dataclasses.replace(made, layers=tuple(at_original(layer) for layer in made.layers))
    assert any(s.share == 0 for layer in made.layers for s in layer.slots)
    with pytest.raises(InputError, match=rf"unequal shares: {engine} splits .* plan with --shares even"):
        from_plan(made, engine, None, False, None)
    even = make_plan(head, ranks=4, slots=16, max_quantized=0.0, budget=2.0, shares="even")
    even = dataclasses.replace(even, layers=tuple(at_original(layer) for layer in even.layers))
    assert from_plan(even, engine, None, False, None).lost_shares == 0


def test_dropping_shares_is_said_with_what_it_costs(tmp_path: Path) -> None:
    counts = np.array([[4000, 90, 80, 70, 60, 50, 40, 30]])
    made = make_plan(Profile(counts, np.arange(1), {}), ranks=4, slots=16)
    kept, dropped = made.predicted["rank_imbalance"], made.predicted["rank_imbalance_even"]
    done = export_plan(made, "sglang", tmp_path / "map.json", ExportOptions(placement_only=True))
    note = next(line for line in done.notes if "unequal shares" in line)
    assert f"(rank imbalance in sample {dropped:.3f} instead of {kept:.3f})" in note
    assert "--ranks 4 --shares even" in note


def at_original(layer: LayerPlan) -> LayerPlan:
    """The layer without lower precision."""
    return dataclasses.replace(layer, slots=tuple(dataclasses.replace(s, precision="original") for s in layer.slots))


@pytest.mark.parametrize("engine", ENGINES)
def test_two_slots_of_an_expert_on_a_rank_are_refused(engine: str) -> None:
    plan = plan_of([layer_plan(2, [[0, 0, 1], [0, 1, 2]], 3)], 2)
    with pytest.raises(InputError, match="layer 2: rank 0 holds expert 0 twice") as caught:
        from_plan(plan, engine, None, True, None)
    assert ("collapses" in str(caught.value)) == (engine == "vllm-ascend")


def test_ranks_other_than_the_engines_are_refused() -> None:
    with pytest.raises(InputError, match="2 ranks, --ep-size asks for 8"):
        from_plan(plan_of([layer_plan(0, NOTES_LAYER, 4)], 2), "sglang", 8, False, None)


def test_layers_of_different_sizes_are_refused_with_the_numbers() -> None:
    plan = plan_of([layer_plan(1, NOTES_LAYER, 4), layer_plan(4, [[0, 1], [2, 3]], 4)], 2)
    with pytest.raises(InputError, match="layer 1 has 6 slots and layer 4 has 4, sglang has one number of replicas"):
        from_plan(plan, "sglang", None, False, None)


def test_ranks_of_different_sizes_are_refused_with_the_numbers() -> None:
    plan = plan_of([layer_plan(1, [[0, 1, 2], [3]], 4)], 2)
    with pytest.raises(InputError, match="layer 1: rank 0 holds 3 slots and rank 1 holds 1"):
        from_plan(plan, "trtllm", None, False, None)


def test_pad_copies_the_busiest_expert_a_slot() -> None:
    plan = plan_of([layer_plan(1, NOTES_LAYER, 4), layer_plan(4, [[0, 1], [2, 3]], 4)], 2)
    counts = np.array([[1, 1, 1, 1], [10, 50, 20, 45]])
    placement = from_plan(plan, "sglang", None, False, loads(plan, counts))
    # Layer 4 has room for one more slot on each rank: expert 1 (50 a slot), then 3 (45 a slot).
    assert placement.added == 2
    assert placement.experts.tolist() == [[0, 1, 2, 0, 1, 3], [0, 1, 3, 2, 3, 1]]


def test_pad_refuses_loads_of_another_model() -> None:
    plan = plan_of([layer_plan(1, [[0, 1, 2], [3]], 4)], 2)
    with pytest.raises(InputError, match="another model"):
        from_plan(plan, "sglang", None, False, Profile(np.ones((1, 4), dtype=np.int64), np.array([2]), {}))


@settings(max_examples=80, deadline=None)
@given(plans(), st.data())
def test_pad_makes_any_plan_whole(plan: Plan, data: st.DataObject) -> None:
    layers = []
    for layer in plan.layers:
        spare = [s for s in layer.slots if [t.expert for t in layer.slots].count(s.expert) > 1 and s.rank]
        gone = data.draw(st.sets(st.sampled_from(spare))) if spare else set()
        left: list[Slot] = []
        for slot in layer.slots:  # drop spare slots as long as one of the expert is left
            rest = [s for s in layer.slots if s.expert == slot.expert and s not in gone]
            if slot not in gone or not rest:
                left.append(slot)
        replicas = np.bincount([s.expert for s in left], minlength=layer.num_experts)
        even = tuple(dataclasses.replace(s, share=1 / int(replicas[s.expert])) for s in left)
        layers.append(LayerPlan(layer.layer, layer.name, layer.num_experts, even))
    ragged = dataclasses.replace(plan, layers=tuple(layers))
    sizes = {sum(s.rank == r for s in la.slots) for la in layers for r in range(plan.ranks)}
    shape = (len(layers), plan.model.num_experts)
    counts = np.array(data.draw(st.lists(st.integers(0, 10**12), min_size=shape[0] * shape[1], max_size=10**4)))
    pad = loads(ragged, counts[: shape[0] * shape[1]].reshape(shape))
    if len(sizes) > 1:
        with pytest.raises(InputError, match="slots"):
            from_plan(ragged, "sglang", None, False, None)
    placement = from_plan(ragged, "sglang", None, False, pad)  # check_placement runs inside
    assert placement.slots == max(sizes) * plan.ranks
    assert placement.added == placement.slots * len(layers) - sum(len(la.slots) for la in layers)
    for row, layer in zip(placement.experts, layers, strict=True):
        had = np.bincount([s.expert for s in layer.slots], minlength=shape[1])
        assert (np.bincount(row, minlength=shape[1]) >= had).all()


def placed(rows: Any, experts: int, ranks: int, layers: tuple[int, ...] = (0,)) -> Placement:
    return Placement(np.array(rows, dtype=np.int64), layers, experts, ranks)


@pytest.mark.parametrize(
    ("placement", "reason"),
    [
        (placed([[0, 1, 2]], 3, 2), "3 slots a layer do not divide by 2 ranks"),
        (placed([[0, 1, 3, 1]], 3, 2), "expert 3 is out of range"),
        (placed([[0, 1, 0, 1]], 3, 2), "expert 2 has no slot"),
        (placed([[0, 0, 1, 2]], 3, 2), "rank 0 holds an expert twice"),
        (placed([[0, 1], [0, 1]], 2, 2, (1, 1)), "layer 1 stands twice"),
    ],
)
def test_placements_no_engine_checks(placement: Placement, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check_placement(placement)
