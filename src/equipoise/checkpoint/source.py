"""The weights of a checkpoint on disk, read lazily: which file holds which tensor, and what belongs to which layer.

Names on disk differ from the model's (most families store one tensor an expert and transformers fuses them on
load). transformers' own conversion rules say which stored tensors make up an experts module; no rule is written
here.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from equipoise.errors import InputError
from equipoise.models.loading import ModelSource

INDEX = "model.safetensors.index.json"


class StoredWeights:
    """The safetensors files of a checkpoint.

    Attributes:
        files: tensor name -> file.
    """

    def __init__(self, source: ModelSource) -> None:
        index = source.path / INDEX
        single = source.path / "model.safetensors"
        if index.is_file():
            try:
                weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                self.files = {name: source.path / file for name, file in weight_map.items()}
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise InputError(f"{index} is not an index of safetensors files ({error!r})") from error
        elif single.is_file():
            self.files = dict.fromkeys(_names(single), single)
        else:
            raise InputError(f"{source.name} has no safetensors weights; convert it with save_pretrained first")
        for file in set(self.files.values()):
            if not file.is_file():
                raise InputError(f"{source.name} is incomplete: {file.name} is missing")

    @property
    def largest_file(self) -> int:
        """Bytes of the largest file: the source's shard size."""
        return max(file.stat().st_size for file in set(self.files.values()))

    def read(self, names: list[str]) -> dict[str, StoredTensor]:
        """The named tensors, each read when transformers (or `[...]`) asks for it."""
        return {name: StoredTensor(self.files[name], name) for name in names}


class StoredTensor:
    """A tensor on disk that is read, and copied, when it is indexed.

    safetensors maps a file into memory, and what was read of it stays there until the file is closed: held open over
    a layer it would count twice. So the file is open for one tensor at a time.
    """

    def __init__(self, file: Path, name: str) -> None:
        self.file = file
        self.name = name

    def __getitem__(self, index: Any) -> torch.Tensor:
        try:
            with safe_open(self.file, framework="pt", device="cpu") as tensors:
                return tensors.get_slice(self.name)[index].clone()
        except SafetensorError as error:
            raise InputError(f"{self.file} is damaged: tensor {self.name} cannot be read ({error})") from error

    def get_shape(self) -> list[int]:
        """Shape, without reading the tensor."""
        with safe_open(self.file, framework="pt", device="cpu") as tensors:
            return tensors.get_slice(self.name).get_shape()

    def get_dtype(self) -> str:
        """Safetensors' name of the dtype, without reading the tensor."""
        with safe_open(self.file, framework="pt", device="cpu") as tensors:
            return tensors.get_slice(self.name).get_dtype()


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise InputError(f"{file} is not a readable safetensors file ({error})") from error


def find_targets(model: PreTrainedModel, stored: StoredWeights) -> dict[str, list[str]]:
    """Which tensors of the model each stored tensor goes into.

    Args:
        model: the skeleton, with its original experts.
        stored: the checkpoint.

    Returns:
        stored name -> the model's names, the one its rule names first in front.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    expected = model.state_dict()
    out = {}
    for name in stored.files:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if renamed not in expected and name in expected:
            renamed, pattern = name, None
        out[name] = _targets(renamed, pattern, converters)
    return out


def names_by_layer(targets: dict[str, list[str]], layers: list[str]) -> dict[str, list[str]]:
    """Which stored tensors make up each experts module.

    A stored tensor may belong to more than one: Ernie 4.5 VL numbers its experts for text and for pictures in one row.

    Args:
        targets: from `find_targets`.
        layers: module paths of the experts.

    Returns:
        module path -> stored names; "" -> everything that belongs to none.
    """
    out: dict[str, list[str]] = defaultdict(list)
    for name, own in targets.items():
        owners = [layer for layer in layers if any(target.startswith(f"{layer}.") for target in own)]
        for owner in owners or [""]:
            out[owner].append(name)
    return out


def _targets(renamed: str, pattern: str | None, converters: list[WeightConverter]) -> list[str]:
    """Every tensor of the model that a stored one goes into; `renamed` is the first its rule names."""
    for rule in converters:
        if pattern in rule.source_patterns:
            first = rule.target_patterns[0]
            return [renamed, *(renamed.replace(first, other) for other in rule.target_patterns[1:])]
    return [renamed]
