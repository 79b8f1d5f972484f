"""`apply --out`: a balanced checkpoint written shard by shard.

For each MoE layer the stored experts are read and fused by transformers' own loader into a skeleton on the meta
device, turned into slots by the same code that balances a model in memory (so both are equal bit for bit), written,
and dropped again. Everything else is copied file by file under its stored name.

Peak memory: one source shard, or what one layer needs while it is converted, whichever is more; the model is never
loaded whole. A layer is converted weight by weight, because fusing holds a weight twice: stacked, and joined. With
gate and up two thirds of an expert that is a third more than the layer, so the whole stays within one shard and one
layer. The destination appears complete or not at all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from equipoise.checkpoint.source import INDEX, StoredWeights, find_targets, names_by_layer
from equipoise.errors import InputError
from equipoise.files.atomic import atomic_directory, require_destination
from equipoise.files.plan_json import check_plan, plan_to_json
from equipoise.memory import frugal_memory, release
from equipoise.models.families import MoELayer, find_layers
from equipoise.models.loading import ModelSource, empty_model, find_source, progress_bars
from equipoise.progress import Track, quietly
from equipoise.runtime.experts import IMPLEMENTATION, Slots
from equipoise.runtime.install import check_fits, install, slot_tensors
from equipoise.runtime.sizes import stored_bytes
from equipoise.types import LayerPlan, Plan

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}


def apply_checkpoint(
    model: str | Path, plan: Plan, out: str | Path, *, force: bool = False, track: Track = quietly
) -> dict[str, dict[str, int]]:
    """Write the balanced checkpoint of a model directory.

    Args:
        model: the original, a local directory or a hub id.
        plan: made for this model.
        out: destination directory.
        force: replace an existing destination.
        track: progress.

    Returns:
        layer name -> precision -> bytes actually written for its experts.

    Raises:
        InputError: before anything is written, when model, plan or destination will not do.
    """
    out = Path(out)
    require_destination(out, force)
    source = find_source(model)
    require_destination(out, force, [source.path])
    skeleton = empty_model(source)
    check_plan(plan)
    layers = find_layers(skeleton)
    check_fits(plan, skeleton, layers)
    stored = StoredWeights(source)
    changed = {layer_plan.name for layer_plan in plan.layers if not layer_plan.is_identity}
    targets = find_targets(skeleton, stored)
    names = _names_to_write(names_by_layer(targets, [layer.name for layer in layers]), changed)
    _check_room(out, stored, plan)
    with frugal_memory(), atomic_directory(out, force) as partial:
        shards = _Shards(partial)
        rest = _by_file(stored, names[""])
        for file_names in track(rest, len(rest), "copying weights"):
            shards.write({name: tensor[...] for name, tensor in stored.read(file_names).items()})
        sizes = {}
        writing = [pair for pair in zip(layers, plan.layers, strict=True) if pair[0].name in names]
        for layer, layer_plan in track(writing, len(writing), "writing experts"):
            name = layer.name
            parts = _by_weight(layer, {stored_name: targets[stored_name] for stored_name in names[name]})
            if name in changed:
                _fill(skeleton, stored, parts, layer, layer_plan)
                sizes[name] = stored_bytes(layer)
            else:
                for weight in parts:
                    _read(skeleton, stored, parts[weight], layer, weight)
            tensors = {f"{name}.{key}": p.detach() for key, p in layer.experts.named_parameters()}
            shards.write(tensors)
            del tensors
            _forget(layer.experts)
            release()
        shards.finish()
        _copy_other_files(source, partial)
        _write_config(source, partial, plan)
    return sizes


def _names_to_write(names: dict[str, list[str]], changed: set[str]) -> dict[str, list[str]]:
    """Keep the layers that cannot be copied as stored; the stored names of all others go under "".

    Those are the changed layers, and layers that share stored tensors with one of them.
    """
    needed = {name for layer in changed for name in names[layer]}
    kept = {layer: own for layer, own in names.items() if layer in changed or (layer and needed & set(own))}
    written = {name for own in kept.values() for name in own}
    rest = dict.fromkeys(name for own in names.values() for name in own if name not in written)
    return {"": list(rest), **kept}


class _Shards:
    """Numbers the output files and remembers what is in each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.parts: list[list[str]] = []
        self.bytes = 0

    def _part(self, number: int) -> Path:
        return self.directory / f"part-{number:05d}.safetensors"

    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write one file."""
        if tensors:
            path = self._part(len(self.parts))
            try:
                save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"format": "pt"})
            except SafetensorError as error:
                # Its text is all that says which error of the system it was.
                found = re.search(r"\(os error (\d+)\)", str(error))
                if found is None:
                    raise
                raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
            self.parts.append(list(tensors))
            self.bytes += sum(v.numel() * v.element_size() for v in tensors.values())

    def finish(self) -> None:
        """Give the files their final names and write the index."""
        total = len(self.parts)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.parts):
            final = f"model-{number + 1:05d}-of-{total:05d}.safetensors"
            self._part(number).rename(self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _by_file(stored: StoredWeights, names: list[str]) -> list[list[str]]:
    files: dict[Path, list[str]] = {}
    for name in names:
        files.setdefault(stored.files[name], []).append(name)
    return [files[file] for file in sorted(files)]


def _by_weight(layer: MoELayer, targets: dict[str, list[str]]) -> dict[str, list[str]]:
    """Stored names by the weight of the experts they go into; "" for what else the module holds (a norm)."""
    out: dict[str, list[str]] = {name: [] for name in [*(weight.name for weight in layer.layout.weights), ""]}
    for name, own in targets.items():
        keys = [target.removeprefix(f"{layer.name}.") for target in own if target.startswith(f"{layer.name}.")]
        out[_weight_name(layer, keys[0])].append(name)
    return out


def _weight_name(layer: MoELayer, key: str) -> str:
    """Which weight a parameter of the experts module holds; the longest name wins (`down_proj_bias`)."""
    return max((weight.name for weight in layer.layout.weights if weight.name in key), key=len, default="")


def _fill(
    skeleton: PreTrainedModel, stored: StoredWeights, parts: dict[str, list[str]], layer: MoELayer, plan: LayerPlan
) -> None:
    """Give one layer of the skeleton its slots, weight by weight."""
    slots = Slots(layer.layout, plan)
    tensors: dict[str, torch.Tensor] = {}
    for weight in layer.layout.weights:
        _read(skeleton, stored, parts[weight.name], layer, weight.name)
        tensors |= slot_tensors(slots, weight)
        _forget(layer.experts, lambda key, name=weight.name: _weight_name(layer, key) == name)  # type: ignore[misc]
    _read(skeleton, stored, parts[""], layer, "")
    install(layer.experts, slots, tensors)


def _read(skeleton: PreTrainedModel, stored: StoredWeights, names: list[str], layer: MoELayer, weight: str) -> None:
    """Fill one weight of a layer of the skeleton from the checkpoint, as `from_pretrained` would."""

    def missing() -> list[str]:
        own = layer.experts.named_parameters()
        return [key for key, p in own if p.is_meta and _weight_name(layer, key) == weight]

    if not missing():
        return
    dtype = layer.layout.dtype
    config = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=skeleton._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(skeleton),  # type: ignore[arg-type]
    )
    with progress_bars(shown=False):
        info, _ = convert_and_load_state_dict_in_model(skeleton, stored.read(names), config)
    if missing() or info.conversion_errors:
        raise InputError(
            f"the checkpoint lacks weights of {layer.name}: {', '.join(missing()) or info.conversion_errors}"
        )


def _forget(module: nn.Module, which: Callable[[str], bool] = lambda key: True) -> None:
    """Drop those tensors of a layer that are no longer needed."""
    for name, parameter in list(module.named_parameters()):
        if which(name):
            # The owner may be a part of the module: Muse Spark has a norm after its experts.
            owner, _, key = name.rpartition(".")
            empty = nn.Parameter(parameter.to("meta"), requires_grad=False)
            module.get_submodule(owner).register_parameter(key, empty)


def _check_room(out: Path, stored: StoredWeights, plan: Plan) -> None:
    """Refuse before writing when the disk cannot hold the result."""
    now = sum(file.stat().st_size for file in set(stored.files.values()))
    needed = now - plan.budget.original_bytes + plan.budget.plan_bytes
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise InputError(f"not enough room for {out}: {needed:,} bytes are needed, {free:,} are free")


def _copy_other_files(source: ModelSource, partial: Path) -> None:
    for file in sorted(source.path.iterdir()):
        weights = file.suffix in _WEIGHTS or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name != "config.json":
            shutil.copyfile(file, partial / file.name)


def _write_config(source: ModelSource, partial: Path, plan: Plan) -> None:
    config: dict[str, Any] = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    # Without `import equipoise`, transformers refuses an experts implementation that nobody registered: a hard
    # error, where an unknown quantization method alone would only warn and load random experts.
    config["experts_implementation"] = IMPLEMENTATION
    config["quantization_config"] = {"quant_method": IMPLEMENTATION, "plan": plan_to_json(plan)}
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
