"""Files for the engines: the exact format, the engines' own view of it, round trips, damage."""

from __future__ import annotations

import inspect
import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from exchange_cases import NOTES_LAYER, damaged, expected, layer_plan, plan_of, plans, unless_refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from equipoise.errors import InputError
from equipoise.exchange import EXPORTERS, ExportOptions, export_plan, exporter, importer, read_placement
from equipoise.exchange.placement import from_plan

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FUZZ = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
KEYS = [
    *("physical_to_logical_map", "num_slots", "initial_global_assignments", "layer_updates_per_iter"),
    *("moe_layer_count", "layer_list", "layer_id", "device_count", "device_list", "device_expert"),
]
FILES = [("sglang", "json"), ("sglang", "pt"), ("trtllm", "yaml"), ("vllm-ascend", "json")]


def written(plan: Any, engine: str, suffix: str, layers: int | None = None) -> bytes:
    """The file's bytes, without a disk."""
    module = exporter(engine)
    placement = from_plan(plan, engine, None, False, None)
    return module.render(module.rows(placement, layers), placement, f".{suffix}")


# --- byte for byte as the engines' formats are written down -----------------------------------------------------


def test_sglang_json_is_the_documented_line(tmp_path: Path) -> None:
    plan = plan_of([layer_plan(0, NOTES_LAYER, 4), layer_plan(1, [[0, 2, 3], [0, 1, 3]], 4)], 2)
    done = export_plan(plan, "sglang", tmp_path / "x.json", ExportOptions(num_hidden_layers=2))
    assert (tmp_path / "x.json").read_bytes() == b'{"physical_to_logical_map": [[0,1,2,0,1,3],[0,2,3,0,1,3]]}'
    assert "--ep-num-redundant-experts 2" in done.start
    assert "--ep-size 2" in done.start


def test_ascend_json_is_the_documented_line(tmp_path: Path) -> None:
    export_plan(plan_of([layer_plan(5, NOTES_LAYER, 4)], 2), "vllm-ascend", tmp_path / "x.json")
    assert (tmp_path / "x.json").read_text() == (
        '{"moe_layer_count":1,"layer_list":[{"layer_id":0,"device_count":2,"device_list":['
        '{"device_id":0,"device_expert":[0,1,2]},{"device_id":1,"device_expert":[0,1,3]}]}]}'
    )


def test_trtllm_yaml_is_the_documented_text(tmp_path: Path) -> None:
    plan = plan_of([layer_plan(3, NOTES_LAYER, 4), layer_plan(4, [[0, 2, 3], [0, 1, 3]], 4)], 2)
    export_plan(plan, "trtllm", tmp_path / "x.yaml")
    assert (tmp_path / "x.yaml").read_text() == (
        "num_slots: 6\nlayer_updates_per_iter: 0\ninitial_global_assignments:\n"
        "  3: [0, 1, 2, 0, 1, 3]\n  4: [0, 2, 3, 0, 1, 3]\n"
    )


def test_sglang_pt_holds_one_integer_tensor(tmp_path: Path) -> None:
    plan = plan_of([layer_plan(1, NOTES_LAYER, 4)], 2)
    export_plan(plan, "sglang", tmp_path / "x.pt", ExportOptions(num_hidden_layers=3))
    document = torch.load(tmp_path / "x.pt", weights_only=True)
    assert list(document) == ["physical_to_logical_map"]
    assert document["physical_to_logical_map"].dtype == torch.int64
    # Layers 0 and 2 are dense: the engine's trivial map.
    assert document["physical_to_logical_map"].tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 3], [0, 1, 2, 3, 0, 1]]
    first = (tmp_path / "x.pt").read_bytes()
    export_plan(plan, "sglang", tmp_path / "y.pt", ExportOptions(num_hidden_layers=3))
    assert (tmp_path / "y.pt").read_bytes() == first


# --- the engines' own view, rebuilt from the descriptions of their parsers --------------------------------------


def sglang_view(
    document: dict[str, Any], layers: int, experts: int, redundant: int, ep_size: int
) -> list[list[list[int]]]:
    """What SGLang makes of the file: [layer][rank] -> logical experts. The document's keys are arguments."""

    def init_by_mapping(server_args: None, model_config: None, physical_to_logical_map: Any) -> torch.Tensor:
        if isinstance(physical_to_logical_map, torch.Tensor):
            return physical_to_logical_map
        return torch.tensor(physical_to_logical_map)

    inspect.signature(init_by_mapping).bind(None, None, **document)  # any further key is a TypeError
    table = init_by_mapping(None, None, **document)
    physical = experts + redundant
    assert physical % ep_size == 0
    assert table.shape == (layers, physical)
    where = [[[p for p in range(physical) if table[la, p] == e] for e in range(experts)] for la in range(layers)]
    assert min(len(slots) for layer in where for slots in layer) >= 1  # an uncovered expert has nowhere to go
    return [[part.tolist() for part in row.chunk(ep_size)] for row in table]


class MoeLoadBalancerConfig(BaseModel):
    """TensorRT-LLM's schema as described: strict keys, static or dynamic."""

    model_config = ConfigDict(extra="forbid")
    num_slots: int | None = None
    initial_global_assignments: dict[int, list[int]] | None = Field(default=None)
    layer_updates_per_iter: int = 0

    def local(self, layer: int, rank: int, ep_size: int, experts: int) -> list[int]:
        """The experts a rank loads for a layer, after the engine's checks."""
        assert self.num_slots is not None
        assert self.initial_global_assignments is not None
        assert self.num_slots % ep_size == 0
        row = self.initial_global_assignments[layer]
        assert len(row) == self.num_slots >= experts
        assert set(row) == set(range(experts))
        size = self.num_slots // ep_size
        return row[rank * size : (rank + 1) * size]


def ascend_view(document: dict[str, Any]) -> list[list[list[int]]]:
    """What vllm-ascend makes of the file: a dense [L, G, slots] tensor, and each rank's expert -> slot map."""
    table = torch.tensor([[d["device_expert"] for d in layer["device_list"]] for layer in document["layer_list"]])
    assert table.shape[:2] == (document["moe_layer_count"], document["layer_list"][0]["device_count"])
    for layer in table:
        for device in layer:
            assert len({int(e): slot for slot, e in enumerate(device)}) == len(device)  # copies collapse here
    return table.tolist()


@QUICK
@given(plans(), st.integers(0, 3), st.sampled_from(["json", "pt"]))
def test_sglang_reads_every_rank(plan: Any, dense_after: int, suffix: str) -> None:
    layers = plan.layers[-1].layer + 1 + dense_after
    data = written(plan, "sglang", suffix, layers)
    document = json.loads(data) if suffix == "json" else dict(exporter_document(data))
    slots = len(plan.layers[0].slots)
    view = sglang_view(document, layers, plan.model.num_experts, slots - plan.model.num_experts, plan.ranks)
    for number, held in expected(plan).items():
        assert view[number] == held
    for number in set(range(layers)) - set(expected(plan)):
        assert list(chain(*view[number])) == [p % plan.model.num_experts for p in range(slots)]


def exporter_document(data: bytes) -> dict[str, Any]:
    import io

    loaded: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
    return loaded


@QUICK
@given(plans())
def test_trtllm_reads_every_rank(plan: Any) -> None:
    config = MoeLoadBalancerConfig.model_validate(yaml.safe_load(written(plan, "trtllm", "yaml")))
    assert config.layer_updates_per_iter == 0
    for number, held in expected(plan).items():
        for rank in range(plan.ranks):
            assert config.local(number, rank, plan.ranks, plan.model.num_experts) == held[rank]


@QUICK
@given(plans())
def test_ascend_reads_every_rank(plan: Any) -> None:
    document = json.loads(written(plan, "vllm-ascend", "json"))
    assert [layer["layer_id"] for layer in document["layer_list"]] == list(range(len(plan.layers)))
    assert ascend_view(document) == list(expected(plan).values())


def test_ascend_counts_layers_in_building_order() -> None:
    plan = plan_of([layer_plan(7, [[0], [1]], 2), layer_plan(2, [[1], [0]], 2)], 2)
    assert ascend_view(json.loads(written(plan, "vllm-ascend", "json"))) == [[[1], [0]], [[0], [1]]]


# --- round trips and damage -------------------------------------------------------------------------------------


@QUICK
@given(plans(), st.sampled_from(FILES))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, plan: Any, file: tuple[str, str]) -> None:
    engine, suffix = file
    path = tmp_path_factory.mktemp("x") / f"map.{suffix}"
    done = export_plan(plan, engine, path)
    rows = read_placement(engine, path)
    assert len(rows) == done.rows
    flat = {number: list(chain(*held)) for number, held in expected(plan).items()}
    if engine == "vllm-ascend":
        assert rows == dict(enumerate(flat.values()))
    else:
        assert {number: rows[number] for number in flat} == flat
    assert done.placement.experts.tolist() == list(flat.values())


@pytest.mark.parametrize(("engine", "suffix"), FILES)
@FUZZ
@given(data=st.data())
def test_damaged_files_are_read_or_refused(engine: str, suffix: str, data: st.DataObject) -> None:
    plan = plan_of([layer_plan(1, NOTES_LAYER, 4), layer_plan(3, [[0, 2, 3], [0, 1, 3]], 4)], 2)
    good = written(plan, engine, suffix, 4 if engine == "sglang" else None)
    bad = data.draw(damaged(good))
    rows = unless_refused(lambda: exporter(engine).parse(bad, f".{suffix}"))
    assert rows is None or all(isinstance(e, int) and e >= 0 for row in rows.values() for e in row)


@pytest.mark.parametrize("engine", list(EXPORTERS))
@QUICK
@given(
    document=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(KEYS),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_document_is_read_or_refused(engine: str, document: Any) -> None:
    unless_refused(lambda: exporter(engine).parse(json.dumps(document).encode(), ".json"))


@pytest.mark.parametrize(
    ("engine", "text", "reason"),
    [
        ("sglang", '{"physical_to_logical_map": [[0,1]], "ep_size": 2}', "unknown key"),
        ("sglang", '{"physical_to_logical_map": [[0,1],[0]]}', "has 1 slots"),
        ("sglang", '{"physical_to_logical_map": [[0,true]]}', "valid integer"),
        ("trtllm", "num_slots: 2\nlayer_updates_per_iter: 0\ninitial_global_assignments: {3: [0]}", "num_slots is 2"),
        ("trtllm", "num_slots: 1\nlayer_updates_per_iter: 1\ninitial_global_assignments: {3: [0]}", "layer_updates"),
        ("trtllm", "!!python/object/apply:os.system ['true']", "not YAML"),
        ("vllm-ascend", '{"moe_layer_count":2,"layer_list":[{"layer_id":0,"device_count":1,"device_list":'
         '[{"device_id":0,"device_expert":[0]}]}]}', "moe_layer_count is 2"),
        ("vllm-ascend", '{"moe_layer_count":1,"layer_list":[{"layer_id":0,"device_count":1,"device_list":'
         '[{"device_id":0,"device_expert":[0,0]}]}]}', "twice"),
    ],
)  # fmt: skip
def test_what_an_engine_would_not_run_is_refused(engine: str, text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        exporter(engine).parse(text.encode(), ".json")


# --- registry ---------------------------------------------------------------------------------------------------


def test_unknown_engines_list_the_choices() -> None:
    with pytest.raises(InputError, match="sglang, trtllm, vllm-ascend"):
        exporter("vllm")
    with pytest.raises(InputError, match="sglang, trtllm, vllm"):
        importer("eplb")


def test_a_wrong_suffix_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    plan = plan_of([layer_plan(0, NOTES_LAYER, 4)], 2)
    with pytest.raises(InputError, match=r"\.json or \.pt"):
        export_plan(plan, "sglang", tmp_path / "map.yaml")
    assert list(tmp_path.iterdir()) == []


def test_too_few_hidden_layers_are_refused(tmp_path: Path) -> None:
    plan = plan_of([layer_plan(5, NOTES_LAYER, 4)], 2)
    for engine, suffix in FILES:
        with pytest.raises(InputError, match="layer 5"):
            export_plan(plan, engine, tmp_path / f"x.{suffix}", ExportOptions(num_hidden_layers=5))


def test_what_placement_only_costs_in_memory_is_said(tmp_path: Path) -> None:
    plan = plan_of([layer_plan(0, NOTES_LAYER, 4, "int8")], 2)
    done = export_plan(plan, "trtllm", tmp_path / "x.yaml", ExportOptions(placement_only=True))
    assert any("2 slots" in note and "1.500 times the memory" in note for note in done.notes)
