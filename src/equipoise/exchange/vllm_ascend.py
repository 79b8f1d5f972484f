"""vllm-ascend: the JSON of `eplb_config.expert_map_path`.

    {"moe_layer_count":1,"layer_list":[{"layer_id":0,"device_count":2,"device_list":[
        {"device_id":0,"device_expert":[0,1,2]},{"device_id":1,"device_expert":[3,0,1]}]}]}

Layers are read by position, in the order the MoE layers are built, so `layer_id` counts MoE layers from 0 and
is not the model's layer number. All device lists are of one length; two copies of an expert on one device would
collapse into one, so there are none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from equipoise.errors import InputError
from equipoise.exchange.base import Rows, Strict, validated
from equipoise.exchange.placement import Placement

SUFFIXES = (".json",)

_Index = Annotated[int, Field(ge=0)]


class _Device(Strict):
    device_id: _Index
    device_expert: Annotated[list[_Index], Field(min_length=1)]


class _Layer(Strict):
    layer_id: _Index
    device_count: _Index
    device_list: Annotated[list[_Device], Field(min_length=1)]


class _File(Strict):
    moe_layer_count: _Index
    layer_list: Annotated[list[_Layer], Field(min_length=1)]


def rows(placement: Placement, num_hidden_layers: int | None) -> Rows:
    """A row for every MoE layer, by its position among them."""
    order = np.argsort(placement.layer_ids, kind="stable")
    return dict(enumerate(placement.experts[order].tolist()))


def render(rows: Rows, placement: Placement, suffix: str) -> bytes:
    """The file's bytes."""
    size = placement.slots // placement.ranks
    layers = [
        {
            "layer_id": position,
            "device_count": placement.ranks,
            "device_list": [
                {"device_id": rank, "device_expert": row[rank * size : (rank + 1) * size]}
                for rank in range(placement.ranks)
            ],
        }
        for position, row in rows.items()
    ]
    return json.dumps({"moe_layer_count": len(layers), "layer_list": layers}, separators=(",", ":")).encode()


def parse(data: bytes, suffix: str) -> Rows:
    """Read the file back.

    Raises:
        InputError: not the schema, devices that differ in number or size, or an expert twice on a device.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the file is not JSON ({error})") from error
    file = validated(_File, document)
    if file.moe_layer_count != len(file.layer_list):
        raise InputError(f"moe_layer_count is {file.moe_layer_count}, layer_list has {len(file.layer_list)}")
    size = len(file.layer_list[0].device_list[0].device_expert)
    out: Rows = {}
    for position, layer in enumerate(file.layer_list):
        where = f"layer_list.{position}"
        if layer.device_count != len(layer.device_list) or layer.device_count != file.layer_list[0].device_count:
            raise InputError(f"{where}: device_count is {layer.device_count}, {len(layer.device_list)} are listed")
        for device in layer.device_list:
            if len(device.device_expert) != size:
                raise InputError(
                    f"{where}: device {device.device_id} has {len(device.device_expert)} slots, not {size}"
                )
            if len(set(device.device_expert)) != size:
                raise InputError(f"{where}: device {device.device_id} holds an expert twice")
        out[position] = [expert for device in layer.device_list for expert in device.device_expert]
    return out


def start(placement: Placement, path: Path) -> str:
    """How to start the engine with the file."""
    config = {"eplb_config": {"expert_map_path": str(path), "num_redundant_experts": placement.redundant}}
    return f"vllm serve … --enable-expert-parallel --additional-config '{json.dumps(config)}'"
