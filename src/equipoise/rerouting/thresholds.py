"""The thresholds of a model, one rule a layer, and their file `laser.json` beside a checkpoint.

{"format": "equipoise-laser", "version": 1, "model_type": "mixtral", "num_experts": 8, "layers": [0, 1, ...],
"rules": [{"gap": 0.1, "mass": 0.9, "extra": 4, "rounds": 12, "target": 1.0,
"keep": 1}, ...]}
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from equipoise.errors import InputError
from equipoise.files.atomic import atomic_file
from equipoise.rerouting.selection import Rule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from equipoise.models.families import MoELayer

FILE = "laser.json"


@dataclass(frozen=True)
class Thresholds:
    """When each layer of one model may leave its top-k.

    Attributes:
        model_type: of the model they were made for.
        num_experts: E.
        layers: the model's own number of each MoE layer.
        rules: one a layer.
    """

    model_type: str
    num_experts: int
    layers: tuple[int, ...]
    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.rules):
            raise InputError(f"laser: {len(self.rules)} rules for {len(self.layers)} layers; give one a layer")

    @classmethod
    def of(cls, model: PreTrainedModel, rules: Rule | Sequence[Rule]) -> Thresholds:
        """Thresholds for `model`: one rule for all its MoE layers, or one for each."""
        from equipoise.models.families import find_layers

        found = find_layers(model)
        each = (rules,) * len(found) if isinstance(rules, Rule) else tuple(rules)
        return cls(model.config.model_type, found[0].num_experts, tuple(layer.layer_id for layer in found), each)

    def check(self, model: PreTrainedModel, found: Sequence[MoELayer]) -> None:
        """Refuse a model that they were not made for.

        Raises:
            InputError: naming what differs.
        """
        here: dict[str, Any] = {
            "model_type": model.config.model_type,
            "num_experts": found[0].num_experts,
            "layers": tuple(layer.layer_id for layer in found),
        }
        for key, value in here.items():
            if getattr(self, key) != value:
                raise InputError(
                    f"the laser thresholds are for a model with {key} {getattr(self, key)!r}, this one has {value!r}; "
                    "calibrate again"
                )


class _Rule(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    gap: float
    mass: float
    extra: int
    rounds: int
    target: float
    keep: int


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal["equipoise-laser"]
    version: Literal[1]
    model_type: str
    num_experts: int
    layers: list[int]
    rules: list[_Rule]


def save_laser(thresholds: Thresholds, path: str | Path) -> Path:
    """Write thresholds to a file, or as `laser.json` into a checkpoint's directory; returns the file's path."""
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    document: dict[str, Any] = {"format": "equipoise-laser", "version": 1} | dataclasses.asdict(thresholds)
    rules = ",\n  ".join(json.dumps(rule) for rule in document.pop("rules"))
    head = json.dumps(document)[:-1]
    with atomic_file(path) as partial:
        partial.write_text(f'{head}, "rules": [\n  {rules}\n]}}\n', encoding="utf-8")
    return path


def load_laser(source: str | Path | PreTrainedModel) -> Thresholds:
    """Read thresholds from a file, from a checkpoint's directory, or from the directory a model was loaded from.

    Raises:
        InputError: there is no such file, or it is not one of thresholds.
    """
    name = source if isinstance(source, (str, Path)) else getattr(source.config, "_name_or_path", "")
    path = Path(name)
    path = path / FILE if path.is_dir() else path
    if not name or not path.is_file():
        raise InputError(
            f"no laser thresholds at {str(path)!r}: give eq.laser calibration batches, or thresholds from "
            "`equipoise laser` or eq.calibrate_laser"
        )
    try:
        document = _File.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        what = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, what["loc"]))
        raise InputError(f"{path} is no file of laser thresholds: {where} {what['msg']}") from error
    rules = tuple(Rule(**rule.model_dump()) for rule in document.rules)
    return Thresholds(document.model_type, document.num_experts, tuple(document.layers), rules)
