"""Plans as JSON: round trips, every check, and mutated files that must never pass for plans."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core_cases import example_plan, one_line, plans
from equipoise.errors import InputError
from equipoise.files import load_plan, plan_from_json, plan_to_json, save_plan
from equipoise.files.plan_json import check_plan
from equipoise.types import Budget, LayerPlan, Slot

FILE = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FILE
@given(plans())
def test_round_trip_through_a_file(tmp_path: Path, plan: Any):
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8")) == plan_to_json(plan)


def test_file_is_for_people(tmp_path: Path):
    save_plan(example_plan(), tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text(encoding="utf-8").splitlines()
    slots = [line for line in lines if '"slots"' in line]
    assert len(slots) == 2
    assert slots[0].strip().startswith('"slots": [[0, "original", 0], [0, "int8", 1], [1, "int8", 0]')
    assert max(map(len, lines)) < 200


def test_counts_of_a_plan():
    plan = example_plan()
    assert plan.num_replicas == 1
    assert plan.num_quantized == 1
    assert plan.layers[0].replicas().tolist() == [2, 1, 1, 1]
    assert plan.layers[0].quantized().tolist() == [False, True, False, False]
    assert [layer.is_identity for layer in plan.layers] == [False, True]


def edited(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """The example plan as JSON with one value changed (or removed, for `...`)."""
    document = copy.deepcopy(plan_to_json(example_plan()))
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "gguf", "format is 'gguf'"),
        (("version",), 2, "version 2 is not readable"),
        (("version",), True, "version"),
        (("version",), 1.0, "version"),
        (("extra",), 1, "extra: unknown key"),
        (("model", "extra"), 1, "model.extra: unknown key"),
        (("layers", 0, "extra"), 1, "layers.0.extra: unknown key"),
        (("preset",), ..., "preset: Field required"),
        (("ranks",), 0, "ranks"),
        (("ranks",), "2", "ranks"),
        (("ranks",), 10**12, "ranks, but no layer has more than 5 slots"),
        (("budget", "plan_bytes"), 801, "over budget: 801 bytes of 800"),
        (("budget", "plan_bytes"), -1, "budget.plan_bytes"),
        (("budget", "limit_bytes"), 7.5, "budget.limit_bytes"),
        (("predicted", "lis"), "high", "predicted.lis"),
        (("layers",), [], "layers"),
        (("model", "num_layers"), 3, "2 layers, but the model has 3"),
        (("layers", 0, "num_experts"), 5, "layer 0: 5 experts, but the model has 4"),
        (("layers", 1, "layer"), -1, "layers.1.layer"),
        (("layers", 0, "slots", 0, 0), 4, "layer 0: expert 4 is out of range 0..3"),
        (("layers", 0, "slots", 0, 0), -1, "layers.0.slots.0.0"),
        (("layers", 0, "slots", 1, 1), "int4", "layers.0.slots.1.1"),
        (("layers", 0, "slots", 1, 2), 2, "layer 0: rank 2 is out of range 0..1"),
        (("layers", 0, "slots", 2), [1, "int8"], "layers.0.slots.2"),
        (("layers", 0, "slots", 2, 0), 2, "layer 0: expert 1 has no slot"),
        (("layers", 0, "shares"), [1.0] * 4, "layer 0: 5 slots but 4 shares"),
        (("layers", 0, "shares", 0), 0.5, "shares of expert 0 add up to 0.75"),
        (("layers", 0, "shares", 0), -0.25, "layers.0.shares.0"),
        (("layers", 0, "shares", 0), 0.0, "shares of expert 0 add up to 0.25"),
        (("layers", 0, "shares", 0), float("nan"), "layers.0.shares.0"),
        (("layers", 0, "slots", 0, 1), "float16", "not sorted"),
    ],
)
def test_each_wrong_value_is_named(path: tuple[Any, ...], value: Any, message: str):
    document = edited(path, value)
    if value == "float16":  # both slots of expert 0 low, the original one behind them
        document["layers"][0]["slots"][1][1] = "original"
    with pytest.raises(InputError) as caught:
        plan_from_json(document)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_expert_counts_beyond_memory_are_no_danger():
    document = edited(("model", "num_experts"), 10**15)
    for layer in document["layers"]:
        layer["num_experts"] = 10**15
    with pytest.raises(InputError, match="has no slot"):
        plan_from_json(document)


def test_layer_that_stands_twice():
    document = edited(("layers", 1, "layer"), 0)
    document["layers"][1]["name"] = "m.0.experts"
    with pytest.raises(InputError, match="twice"):
        plan_from_json(document)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1, 2]", "a plan is a JSON object"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"format": "equipoise-plan", "version": ' + b"1" * 5000 + b"}", "is not JSON"),
        (b'{"format": "equipoise-plan", "version": 1, "version": 1}', "key 'version' stands twice"),
    ],
)
def test_files_that_are_no_plans(tmp_path: Path, text: bytes, message: str):
    (tmp_path / "plan.json").write_bytes(text)
    with pytest.raises(InputError, match=message):
        load_plan(tmp_path / "plan.json")


def test_missing_file(tmp_path: Path):
    with pytest.raises(InputError, match="no such plan"):
        load_plan(tmp_path / "plan.json")
    with pytest.raises(InputError, match="no such plan"):
        load_plan(tmp_path)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ((Slot(0), Slot(1), Slot(2)), "expert 3 has no slot"),
        ((Slot(0), Slot(1), Slot(2), Slot(3, share=float("nan"))), "share of expert 3 is nan"),
        ((Slot(0, share=1.5), Slot(0, share=-0.5), Slot(1), Slot(2), Slot(3)), "share of expert 0 is 1.5"),
        ((Slot(0), Slot(1), Slot(2), Slot(3, "int4")), "precision 'int4'"),  # type: ignore[arg-type]
        ((Slot(-1), Slot(0), Slot(1), Slot(2), Slot(3)), "expert -1 is out of range"),
    ],
)
def test_plans_built_in_python_are_checked_too(slots: tuple[Slot, ...], message: str):
    plan = example_plan()
    plan = dataclasses.replace(plan, layers=(LayerPlan(0, "x", 4, slots), plan.layers[1]))
    with pytest.raises(InputError, match=message):
        check_plan(plan)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path into a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in inside for place in _places(child, (*path, key)))]


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
    st.just([[0, "original", 0]]),
).map(copy.deepcopy)  # each draw its own list: one list in two places could come to hold itself


def independently_valid(document: Any) -> bool:
    """The rules of a plan, written again and apart from the code that is tested."""
    model, layers, budget = document["model"], document["layers"], document["budget"]
    if document["version"] != 1 or len(layers) != model["num_layers"]:
        return False
    if budget["plan_bytes"] > budget["limit_bytes"] or min(budget.values()) < 0:
        return False
    for layer in layers:
        total = [0.0] * model["num_experts"]
        for (expert, precision, rank), share in zip(layer["slots"], layer["shares"], strict=True):
            if precision not in ("original", "int8", "float16") or not 0 <= rank < document["ranks"] or share <= 0:
                return False
            total[expert] += share
        if layer["num_experts"] != len(total) or any(abs(t - 1) > 1e-5 for t in total):
            return False
    return True


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_mutated_documents(data: st.DataObject):
    """One or two changes anywhere: refused in one line, or a plan that keeps the rules and says what was read."""
    document = plan_to_json(example_plan())
    for _ in range(data.draw(st.integers(1, 2))):
        places = [place for place in _places(document) if place]
        *way, last = data.draw(st.sampled_from(places))
        place: Any = document
        for key in way:
            place = place[key]
        action = data.draw(st.sampled_from(["replace", "remove", "add", "repeat"]))
        if action == "remove":
            del place[last]
        elif action == "repeat" and isinstance(place, list):
            place.insert(last, copy.deepcopy(place[last]))
        elif action == "add" and isinstance(place, dict):
            place[data.draw(st.text(max_size=6))] = data.draw(JUNK)
        else:
            place[last] = data.draw(JUNK)
    text = json.dumps(document)
    try:
        plan = plan_from_json(json.loads(text))
    except InputError as error:
        one_line(error)
    else:
        assert independently_valid(document)
        assert plan_to_json(plan) == document


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 3))
def test_mutated_bytes(tmp_path: Path, at: int, value: int, cut: int):
    """One byte of the file replaced, or a few cut out."""
    path = tmp_path / "plan.json"
    if not (tmp_path / "good.json").exists():
        save_plan(example_plan(), tmp_path / "good.json")
    good = (tmp_path / "good.json").read_bytes()
    at %= len(good)
    path.write_bytes(good[:at] + (b"" if cut else bytes([value])) + good[at + max(cut, 1) :])
    try:
        plan = load_plan(path)
    except InputError as error:
        one_line(error, f"plan {path}")
    else:
        assert independently_valid(json.loads(path.read_text(encoding="utf-8")))
        assert check_plan(plan) == plan


def test_over_budget_in_python():
    plan = dataclasses.replace(example_plan(), budget=Budget(800, 799, 800))
    with pytest.raises(InputError, match="over budget"):
        check_plan(plan)


def test_an_integer_that_no_float_holds():
    document = plan_to_json(example_plan())
    document["predicted"]["lis"] = 2**53 + 1
    with pytest.raises(InputError, match=r"predicted.*2\*\*53"):
        plan_from_json(document)
    document["predicted"]["lis"] = 2**53
    assert plan_to_json(plan_from_json(document)) == document
