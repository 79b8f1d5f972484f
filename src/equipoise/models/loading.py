"""Loading a model, or only its skeleton: a local directory or a hub id, decoder-only or encoder-decoder.

The skeleton lives on the meta device and costs no memory; it decides whether a family is supported before any
weight is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from equipoise.demo import model_dir
from equipoise.errors import InputError
from equipoise.models.families import find_layers

QUANT_METHOD = "equipoise"
DEMO = "demo"
"""Name of the bundled model, where no directory of that name is at hand."""


@dataclass(frozen=True)
class ModelSource:
    """A model on disk.

    Attributes:
        name: as the user gave it.
        path: local directory.
        config: its configuration.
    """

    name: str
    path: Path
    config: PretrainedConfig

    @property
    def is_balanced(self) -> bool:
        """True for a checkpoint that equipoise wrote."""
        return (getattr(self.config, "quantization_config", None) or {}).get("quant_method") == QUANT_METHOD


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with its tokenizer."""

    source: ModelSource
    model: PreTrainedModel
    tokenizer: Any

    @property
    def is_encoder_decoder(self) -> bool:
        """True for models such as Switch Transformers."""
        return bool(self.source.config.is_encoder_decoder)


def find_source(name: str | Path) -> ModelSource:
    """Resolve a local directory, `demo`, or a hub id (downloaded or cached) and read its configuration.

    Raises:
        InputError: no such model, no config.json, a family transformers does not know.
    """
    path = Path(name).expanduser()
    if str(name) == DEMO and not path.is_dir():
        path = model_dir()
    if not path.is_dir():
        path = _from_hub(str(name))
    if not (path / "config.json").is_file():
        raise InputError(f"no such model: {name} holds no config.json")
    try:
        config = AutoConfig.from_pretrained(path)
    except (ValueError, KeyError, OSError, json.JSONDecodeError, StrictDataclassError) as error:
        raise InputError(f"the config.json of {name} is not readable by transformers: {_reason(error)}") from error
    return ModelSource(str(name), path, config)


def _from_hub(name: str) -> Path:
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).exists()
    if looks_local:
        raise InputError(f"no such model: {name} is neither a directory nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:  # the hub raises a dozen kinds, offline among them
        raise InputError(
            f"no such model: {name} is not a local directory, and the hub gave nothing ({_first_line(error)})"
        ) from error


def _reason(error: BaseException) -> str:
    """The line that says what is wrong: the last one where a configuration class has checked its fields."""
    if isinstance(error, StrictDataclassError):
        return str(error).strip().splitlines()[-1].strip()[:200]
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def auto_class(config: PretrainedConfig) -> Any:
    """The Auto class that builds this configuration as a language model.

    Raises:
        InputError: transformers has no language-model class for it.
    """
    choices = (
        (AutoModelForSeq2SeqLM,) if config.is_encoder_decoder else (AutoModelForCausalLM, AutoModelForImageTextToText)
    )
    for choice in choices:
        if type(config) in choice._model_mapping:
            return choice
    raise InputError(f"model_type {config.model_type!r} has no language-model class in transformers")


def empty_model(source: ModelSource) -> PreTrainedModel:
    """The model's skeleton on the meta device, checked to have MoE layers that can be balanced.

    Raises:
        InputError: not an MoE, an unsupported family, already quantized, already balanced.
    """
    config = source.config
    if source.is_balanced:
        raise InputError(f"{source.name} is balanced already; start from the original model")
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else quantized
        raise InputError(f"{source.name} is quantized already ({method}); equipoise needs 16-bit or float32 experts")
    builder, dtype = auto_class(config), _dtype(source)
    try:
        with torch.device("meta"):
            model = builder.from_config(config, dtype=dtype)
    except Exception as error:  # a configuration can be wrong in as many ways as there are families
        raise InputError(
            f"transformers cannot build {source.name} ({config.model_type}) from its config.json: "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error
    find_layers(model)
    return model


def _dtype(source: ModelSource) -> torch.dtype:
    """The dtype `from_pretrained(dtype="auto")` would take: the config's, else that of the first float tensor."""
    if source.config.dtype is not None:
        dtype = source.config.dtype
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype
    from safetensors import safe_open

    for file in sorted(source.path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a dict
                kind = tensors.get_slice(key).get_dtype()
                if kind in _SAFETENSORS:
                    return _SAFETENSORS[kind]
    raise InputError(f"{source.name} has no safetensors weights; convert it with save_pretrained first")


_SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer.

    Raises:
        InputError: there is none in the directory.
    """
    try:
        return AutoTokenizer.from_pretrained(source.path)
    except Exception as error:  # tokenizers raise bare Exceptions on damaged files
        raise InputError(f"{source.name} has no readable tokenizer: {_first_line(error)}") from error


@contextlib.contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Show transformers' own bars inside the block, or keep them out of a log."""
    before = transformers_logging.is_progress_bar_enabled()
    (transformers_logging.enable_progress_bar if shown else transformers_logging.disable_progress_bar)()
    try:
        yield
    finally:
        (transformers_logging.enable_progress_bar if before else transformers_logging.disable_progress_bar)()


@contextlib.contextmanager
def _no_load_report() -> Iterator[None]:
    """Keep transformers' table of what did not load off stderr: it is refused below, in one line."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def default_device() -> str:
    """`cuda` when there is one and EQUIPOISE_DEVICE does not say `cpu`, else `cpu`."""
    return "cuda" if torch.cuda.is_available() and os.environ.get("EQUIPOISE_DEVICE") != "cpu" else "cpu"


def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    tokenizer: bool = True,
) -> LoadedModel:
    """Load a model, balanced or not, in evaluation mode.

    Args:
        name: local directory or hub id.
        dtype: as `from_pretrained`.
        device: where to put it; None: `default_device`.
        tokenizer: load the tokenizer too.

    Raises:
        InputError: no such model, no weights, weights damaged or incomplete, no tokenizer.
    """
    source = find_source(name)
    words = load_tokenizer(source) if tokenizer else None
    try:
        with progress_bars(shown=sys.stderr.isatty()), _no_load_report():
            model, info = auto_class(source.config).from_pretrained(
                source.path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except SafetensorError as error:
        raise InputError(f"{source.name} is damaged: {_first_line(error)}") from error
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        raise InputError(f"{source.name} is incomplete or damaged: transformers cannot join its experts") from error
    except OSError as error:
        if not any(source.path.glob("*.safetensors")):
            raise InputError(f"{source.name} has no safetensors weights: {_first_line(error)}") from error
        raise
    # transformers gives random weights to what is missing or of another shape, and at best warns.
    if info["mismatched_keys"]:
        name, stored, wanted = min(info["mismatched_keys"])
        raise InputError(
            f"the weights of {source.name} do not fit its config.json: {name} is {tuple(stored)}, not {tuple(wanted)}"
        )
    if info["missing_keys"]:
        some = sorted(info["missing_keys"])
        more = f" and {len(some) - 3} more" if len(some) > 3 else ""
        raise InputError(f"{source.name} is incomplete: its files lack {', '.join(some[:3])}{more}")
    return LoadedModel(source, model.to(default_device() if device is None else device).eval(), words)
