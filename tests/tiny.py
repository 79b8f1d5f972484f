"""Tiny random models of every MoE family that equipoise supports, and a way to save them.

`FAMILIES[name]()` builds one: seeded, random weights, on the CPU, in evaluation mode, 2 or 3 MoE layers of 8 experts,
hidden 32, 128 words. The name is the directory of the family in `transformers.models`, or its module in
`equipoise.native`.
What transformers initialises to a constant (selection biases, expert biases, norms) gets noise, so that a result
shows when one of them is forgotten.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from tiny_families import CONFIGURATIONS, EXPERTS, LEFT_OUT, NATIVE, SIZES, VOCAB

__all__ = ["EXPERTS", "FAMILIES", "LEFT_OUT", "NATIVE", "VOCAB", "build", "configure", "save_tiny", "tiny_tokenizer"]


def configure(config_class: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    """A tiny configuration: the common sizes it knows, also in its parts, then `changes`."""
    names = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    values = {key: value for key, value in SIZES.items() if key in names}
    for alias, name in config_class.attribute_map.items():
        if alias in values and (name in values or name in changes):
            del values[alias]
    changes = dict(changes)
    for part, part_class in config_class.sub_configs.items():
        given = changes.pop(part, {})
        values[part] = given if isinstance(given, PreTrainedConfig) else configure(part_class, given)
    return config_class(**(values | changes))


def build(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build the tiny model of a family.

    Args:
        name: key of `FAMILIES`.
        dtype: of the weights.
        seed: of the weights.
        **changes: further configuration values.
    """
    class_name, own = CONFIGURATIONS[name]
    module = f"equipoise.native.{name}" if name in NATIVE else f"transformers.models.{name}.modeling_{name}"
    model_class = getattr(importlib.import_module(module), class_name)
    config = configure(model_class.config_class, own | changes)
    config.dtype = dtype
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        _add_noise(model)
    return model.to(dtype).eval()


def _add_noise(model: PreTrainedModel) -> None:
    """Noise on every weight, and every buffer that biases the selection, that is still constant."""
    biases = [tensor for name, tensor in model.named_buffers() if "bias" in name]
    with torch.no_grad():
        for tensor in [*model.parameters(), *biases]:
            if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
        for module in model.modules():
            if hasattr(module, "tid2eid"):
                _fill_table(module.tid2eid)
            if hasattr(module, "balancing_biases"):
                # ZAYA: a sharper router, in which the class that skips all experts (the last one, which transformers
                # sets to -1 on every load) wins sometimes.
                module.balancing_biases.normal_(-1, 0.02)
                module.balancing_biases[-1] = -1
                for linear in (module.router_mlp.fc1, module.router_mlp.fc2, module.router_mlp.out_proj):
                    linear.weight.mul_(4)


def _fill_table(experts_of_token: torch.Tensor) -> None:
    """DeepSeek-V4 routes its first layers by token id: k different experts each, low numbers more often."""
    words, k = experts_of_token.shape
    taste = torch.linspace(2, 0, EXPERTS).exp().expand(words, EXPERTS)
    experts_of_token.copy_(torch.multinomial(taste, k))


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {name: partial(build, name) for name in sorted(CONFIGURATIONS)}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words `w3` .. `w127` of the tiny vocabulary, split at white space; 0 pads, 1 begins, 2 ends."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save_tiny(model: PreTrainedModel, directory: Path, max_shard_size: str | int = "5GB") -> Path:
    """Save a model with a tokenizer as a plain Hugging Face directory, and return it."""
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(directory)
    return directory
