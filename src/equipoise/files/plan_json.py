"""Plans as JSON that a person can read and diff: one line a slot list, versioned, unknown keys refused.

{"format": "equipoise-plan", "version": 1, "model": {...}, "profile_sha256": "...", "preset": "joint",
"seed": 0, "budget": {"original_bytes": ..., "limit_bytes": ..., "plan_bytes": ...}, "ranks": 1,
"predicted": {"lis": 1.02},
"layers": [{"layer": 0, "name": "model.layers.0.mlp.experts", "num_experts": 8,
"slots": [[0, "original", 0], [0, "int8", 0], ...], "shares": [0.5, 0.5, ...]}]}
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from equipoise.errors import InputError
from equipoise.files.atomic import atomic_file
from equipoise.files.documents import validated
from equipoise.types import PRECISIONS, Budget, LayerPlan, ModelIdentity, Plan, Precision, Slot

FORMAT = "equipoise-plan"
VERSION = 1

_Count = Annotated[int, Field(ge=0)]


def _exact(value: Any) -> Any:
    """Integers that a float holds; larger ones would be read as another number."""
    if isinstance(value, int) and abs(value) > 1 << 53:
        raise ValueError("an integer beyond 2**53, which a float does not hold")
    return value


_Finite = Annotated[float, BeforeValidator(_exact), Field(allow_inf_nan=False, strict=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Model(_Strict):
    name: str
    model_type: str
    num_layers: Annotated[int, Field(ge=1)]
    num_experts: Annotated[int, Field(ge=1)]
    top_k: _Count
    dtype: str


class _Budget(_Strict):
    original_bytes: _Count
    limit_bytes: _Count
    plan_bytes: _Count


class _Layer(_Strict):
    layer: _Count
    name: str
    num_experts: Annotated[int, Field(ge=1)]
    # JSON arrays arrive as lists, which strict mode would refuse for a tuple.
    slots: list[Annotated[tuple[_Count, Precision, _Count], Field(strict=False)]]
    shares: list[Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=False)]]


class _Plan(_Strict):
    format: Literal["equipoise-plan"]
    version: int
    model: _Model
    profile_sha256: str
    preset: str
    seed: int
    budget: _Budget
    ranks: Annotated[int, Field(ge=1)]
    predicted: dict[str, _Finite]
    layers: Annotated[list[_Layer], Field(min_length=1)]


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON values."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": dataclasses.asdict(plan.model),
        "profile_sha256": plan.profile_sha256,
        "preset": plan.preset,
        "seed": plan.seed,
        "budget": dataclasses.asdict(plan.budget),
        "ranks": plan.ranks,
        "predicted": {name: float(value) for name, value in plan.predicted.items()},
        "layers": [
            {
                "layer": layer.layer,
                "name": layer.name,
                "num_experts": layer.num_experts,
                "slots": [[s.expert, s.precision, s.rank] for s in layer.slots],
                "shares": [s.share for s in layer.slots],
            }
            for layer in plan.layers
        ],
    }


def plan_from_json(document: Any) -> Plan:
    """Build a plan from JSON values and check all of it.

    Raises:
        InputError: naming the key and what is wrong with it.
    """
    raw = validated(_Plan, document, what="a plan is", format=FORMAT, version=VERSION, command="equipoise plan")
    return check_plan(
        Plan(
            model=ModelIdentity(**raw.model.model_dump()),
            profile_sha256=raw.profile_sha256,
            preset=raw.preset,
            seed=raw.seed,
            budget=Budget(**raw.budget.model_dump()),
            ranks=raw.ranks,
            layers=tuple(_layer(layer) for layer in raw.layers),
            predicted=raw.predicted,
        )
    )


def _layer(raw: _Layer) -> LayerPlan:
    if len(raw.slots) != len(raw.shares):
        raise InputError(f"layer {raw.layer}: {len(raw.slots)} slots but {len(raw.shares)} shares")
    slots = tuple(
        Slot(expert, precision, rank, share)
        for (expert, precision, rank), share in zip(raw.slots, raw.shares, strict=True)
    )
    return LayerPlan(raw.layer, raw.name, raw.num_experts, slots)


def check_plan(plan: Plan) -> Plan:
    """Check what no schema can: every expert has a slot, shares add up, ranks exist, the budget is kept.

    Raises:
        InputError: naming the layer and what is wrong with it.
    """
    if not plan.layers:
        raise InputError("a plan needs at least one layer")
    if len(plan.layers) != plan.model.num_layers:
        raise InputError(f"{len(plan.layers)} layers, but the model has {plan.model.num_layers}")
    if len({(layer.layer, layer.name) for layer in plan.layers}) != len(plan.layers):
        raise InputError("a layer stands twice")
    for layer in plan.layers:
        where = f"layer {layer.layer}"
        if layer.num_experts != plan.model.num_experts:
            raise InputError(f"{where}: {layer.num_experts} experts, but the model has {plan.model.num_experts}")
        shares: dict[int, float] = {}
        for slot in layer.slots:
            if not 0 <= slot.expert < layer.num_experts:
                raise InputError(f"{where}: expert {slot.expert} is out of range 0..{layer.num_experts - 1}")
            if not 0 <= slot.rank < plan.ranks:
                raise InputError(f"{where}: rank {slot.rank} is out of range 0..{plan.ranks - 1}")
            if slot.precision not in PRECISIONS:
                raise InputError(f"{where}: precision {slot.precision!r} is not one of {', '.join(PRECISIONS)}")
            if not 0 <= slot.share <= 1:
                raise InputError(f"{where}: a share of expert {slot.expert} is {slot.share:g}, not in [0, 1]")
            shares[slot.expert] = shares.get(slot.expert, 0.0) + slot.share
        if len(shares) < layer.num_experts:
            missing = next(expert for expert in range(layer.num_experts) if expert not in shares)
            raise InputError(f"{where}: expert {missing} has no slot")
        for expert, share in sorted(shares.items()):
            if not math.isclose(share, 1.0, abs_tol=1e-6):
                raise InputError(f"{where}: the shares of expert {expert} add up to {share:g}, not 1")
        order = [(s.expert, s.precision != "original") for s in layer.slots]
        if order != sorted(order):
            raise InputError(f"{where}: slots are not sorted by expert with the original precision first")
    most = max(len(layer.slots) for layer in plan.layers)
    if plan.ranks > most:
        raise InputError(f"{plan.ranks} ranks, but no layer has more than {most} slots")
    if plan.budget.plan_bytes > plan.budget.limit_bytes:
        raise InputError(
            f"the plan is over budget: {plan.budget.plan_bytes:,} bytes of {plan.budget.limit_bytes:,} allowed"
        )
    return plan


def load_plan(path: Path) -> Plan:
    """Read and check a plan.

    Raises:
        InputError: with the file, the key, and what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such plan: {path}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_key_twice)
    except InputError as error:
        raise InputError(f"plan {path}: {error}") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number of thousands of digits
        raise InputError(f"plan {path} is not JSON ({error})") from error
    try:
        return plan_from_json(document)
    except InputError as error:
        raise InputError(f"plan {path}: {error}") from None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused where a key stands twice: json would keep the last and say nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise InputError(f"key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan, whole or not at all: one key a line, one line a layer's slots and one its shares."""
    document = plan_to_json(plan)
    layers = document.pop("layers")
    head = json.dumps(document, indent=1)[:-2]
    body = ",\n".join(
        "  {" + ",\n   ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in layer.items()) + "}"
        for layer in layers
    )
    with atomic_file(Path(path)) as partial:
        partial.write_text(f'{head},\n "layers": [\n{body}\n ]\n}}\n', encoding="utf-8")
