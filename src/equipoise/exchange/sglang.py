"""SGLang: `--init-expert-location FILE`, `{"physical_to_logical_map": [[...], ...]}` as `.json` or `.pt`.

One row for every hidden layer, dense layers included, indexed by the model's own layer number; rows of dense
layers are never read and get the engine's own trivial map `i % E`. The map must be the file's only key. The
engine checks divisibility alone (SGLang 0.5.23, `compute_initial_expert_location_metadata`), so coverage is
checked here. Any suffix other than these two would be taken as inline JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from equipoise.errors import InputError
from equipoise.exchange import torch_file
from equipoise.exchange.base import Rows, Strict, validated
from equipoise.exchange.placement import Placement

SUFFIXES = (".json", ".pt")
KEY = "physical_to_logical_map"

_Expert = Annotated[int, Field(ge=0)]


class _File(Strict):
    physical_to_logical_map: Annotated[list[Annotated[list[_Expert], Field(min_length=1)]], Field(min_length=1)]


def rows(placement: Placement, num_hidden_layers: int | None) -> Rows:
    """A row for every hidden layer, by the model's own layer number."""
    count = num_hidden_layers or max(placement.layer_ids) + 1
    trivial = [p % placement.num_experts for p in range(placement.slots)]
    moe = dict(zip(placement.layer_ids, placement.experts.tolist(), strict=True))
    return {layer: moe.get(layer, list(trivial)) for layer in range(count)}


def render(rows: Rows, placement: Placement, suffix: str) -> bytes:
    """The file's bytes: one JSON line, also fit to be pasted as the option's value, or a torch archive."""
    table = [rows[layer] for layer in range(len(rows))]
    if suffix == ".pt":
        return torch_file.dumps({KEY: np.array(table, dtype=np.int64)})
    return json.dumps({KEY: table}, separators=(",", ": ")).encode()


def parse(data: bytes, suffix: str) -> Rows:
    """Read the file back.

    Raises:
        InputError: the engine would not read it, or its rows differ in length.
    """
    if suffix == ".pt":
        document = torch_file.load(data)
        if not isinstance(document, dict) or set(document) != {KEY}:
            raise InputError(f"the file must hold {KEY!r} and nothing else")
        table = torch_file.integers(document[KEY], KEY, 2).tolist()
        if not table or not table[0] or min(map(min, table)) < 0:
            raise InputError(f"{KEY} is empty or holds negative experts")
    else:
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the file is not JSON ({error})") from error
        table = validated(_File, document).physical_to_logical_map
    for layer, row in enumerate(table):
        if len(row) != len(table[0]):
            raise InputError(f"{KEY}.{layer} has {len(row)} slots, row 0 has {len(table[0])}")
    return dict(enumerate(table))


def start(placement: Placement, path: Path) -> str:
    """How to start the engine with the file."""
    return (
        f"python -m sglang.launch_server … --init-expert-location {path} --ep-size {placement.ranks} "
        f"--ep-num-redundant-experts {placement.redundant}"
    )
