"""TensorRT-LLM: the YAML of `MoeLoadBalancerConfig`.

    num_slots: 6
    layer_updates_per_iter: 0
    initial_global_assignments:
      3: [0, 1, 2, 3, 0, 1]

Keys are the model's own layer numbers, every MoE layer present, each list `num_slots` long, every expert in it;
`layer_updates_per_iter: 0` keeps the placement static. `num_slots` must divide by the expert-parallel size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from equipoise.errors import InputError
from equipoise.exchange.base import Rows, Strict, validated
from equipoise.exchange.placement import Placement

SUFFIXES = (".yaml", ".yml")

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Index = Annotated[int, Field(ge=0)]


class _File(Strict):
    num_slots: Annotated[int, Field(ge=1)]
    layer_updates_per_iter: Literal[0]
    initial_global_assignments: Annotated[dict[_Index, list[_Index]], Field(min_length=1)]


class _Flow(list[int]):
    """A list written on one line."""


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Safe dumper that knows `_Flow`."""


_Dumper.add_representer(
    _Flow, lambda dumper, row: dumper.represent_sequence("tag:yaml.org,2002:seq", row, flow_style=True)
)


def rows(placement: Placement, num_hidden_layers: int | None) -> Rows:
    """A row for every MoE layer, by the model's own layer number."""
    return dict(zip(placement.layer_ids, placement.experts.tolist(), strict=True))


def render(rows: Rows, placement: Placement, suffix: str) -> bytes:
    """The file's bytes, a line a layer."""
    document = {
        "num_slots": placement.slots,
        "layer_updates_per_iter": 0,
        "initial_global_assignments": {layer: _Flow(row) for layer, row in rows.items()},
    }
    text: str = yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=2**31 - 1)
    return text.encode()


def parse(data: bytes, suffix: str) -> Rows:
    """Read the file back.

    Raises:
        InputError: not YAML, not the schema, not static, or a list of another length than `num_slots`.
    """
    try:
        document = yaml.load(data, Loader=_LOADER)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, AttributeError, KeyError, IndexError) as error:
        raise InputError(f"the file is not YAML ({error})") from error
    file = validated(_File, document)
    for layer, row in file.initial_global_assignments.items():
        if len(row) != file.num_slots:
            raise InputError(f"layer {layer} has {len(row)} slots, num_slots is {file.num_slots}")
    return file.initial_global_assignments


def start(placement: Placement, path: Path) -> str:
    """How to start the engine with the file."""
    return f"in the LLM API options: moe_config: {{load_balancer: {path}}}, moe_expert_parallel_size: {placement.ranks}"
