"""The paper's checkpoints: their own configurations, scaled down, through the commands that docs/checkpoints.md shows.

Everything that decides how such a model routes is kept as published: number of experts, top-k, dense and sparse
layers, shared experts, flags, dtype. Scaled down are widths, layers and the vocabulary (`SMALL`); token ids are the
tiny tokenizer's. Gates are made stronger, since random ones of the published scale hardly choose.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from core_models import write_text
from equipoise.cli.main import run
from equipoise.files import load_plan
from equipoise.models import find_layers
from equipoise.models.loading import auto_class, find_source, load_model
from equipoise.runtime import apply
from tiny import VOCAB, save_tiny

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "checkpoints"))
import memory

_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = _TOKENS | {"hidden_size": 128, "num_hidden_layers": 3}
_DEEPSEEK = _LLAMA | {"intermediate_size": 96, "moe_intermediate_size": 32}
_SWITCH = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "d_ff": 64,
    "d_kv": 8,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "eos_token_id": 2,
}
# Name -> what is scaled down; parameters as published in thousand millions; experts, top-k; a name on disk.
SMALL: dict[str, tuple[dict[str, Any], float, int, int, str]] = {
    "deepseek-moe-16b-base": (_DEEPSEEK, 16.4, 64, 6, "model.layers.1.mlp.experts.63.gate_proj.weight"),
    "DeepSeek-V2-Lite": (
        _DEEPSEEK | {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
        15.7,
        64,
        6,
        "model.layers.1.mlp.experts.63.gate_proj.weight",
    ),
    "Mixtral-8x7B-v0.1": (
        _LLAMA | {"intermediate_size": 64},
        46.7,
        8,
        2,
        "model.layers.0.block_sparse_moe.experts.7.w1.weight",
    ),
    "LLaMA-MoE-v1-3_5B-2_8": (
        _LLAMA | {"intermediate_size": 256, "size_experts": [[32] * 8] * 3},
        6.7,
        8,
        2,
        "model.layers.0.mlp.calculator.experts.weight_gate.7",
    ),
    "switch-base-8": (_SWITCH, 0.62, 8, 1, "encoder.block.1.layer.1.mlp.experts.expert_7.wi.weight"),
    "switch-base-16": (_SWITCH, 1.07, 16, 1, "decoder.block.3.layer.2.mlp.experts.expert_15.wo.weight"),
}


def published(name: str) -> dict[str, Any]:
    return json.loads((memory.CONFIGS / name / "config.json").read_text(encoding="utf-8"))


def write(name: str, path: Path) -> Path:
    """A random checkpoint of the scaled-down configuration in the published layout."""
    path.mkdir()
    small = SMALL[name][0]
    assert set(small) <= {*published(name), "pad_token_id"}
    (path / "config.json").write_text(json.dumps(published(name) | small), encoding="utf-8")
    config = find_source(path).config
    torch.manual_seed(0)
    model = auto_class(config).from_config(config).eval()
    for key, parameter in model.named_parameters():
        if "mlp.gate" in key or "router" in key:
            parameter.data.mul_(20)
    save_tiny(model, path / "saved")
    for file in (path / "saved").iterdir():
        if file.name != "config.json":
            file.rename(path / file.name)
    return path


def command(capsys: Any, *arguments: object) -> dict[str, Any]:
    assert run([str(part) for part in arguments]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 120, (2, 10), generator=torch.Generator().manual_seed(3))
    batch = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    with torch.inference_mode():
        return model(**batch).logits


@pytest.mark.parametrize("name", SMALL)
def test_the_documented_commands(name: str, tmp_path: Path, capsys: Any):
    _, _, experts, top_k, on_disk = SMALL[name]
    source = write(name, tmp_path / name)
    with safe_open(source / "model.safetensors", framework="pt") as stored:
        assert on_disk in set(stored.keys())
    data = write_text(tmp_path / "text.txt", documents=30)
    options = ("--seq-len", 32, "--max-tokens", 600)
    profiled = command(capsys, "profile", source, "--data", data, "--out", tmp_path / "p.npz", *options)
    assert (profiled["experts"], profiled["top_k"]) == (experts, top_k)
    planned = command(capsys, "plan", tmp_path / "p.npz", "--out", tmp_path / "plan.json")
    assert planned["replicas"] > 0
    command(capsys, "apply", source, tmp_path / "plan.json", "--out", tmp_path / "balanced")
    scored = command(capsys, "eval", tmp_path / "balanced", "--against", source, "--data", data, *options[:2])
    assert scored["difference"]

    model = load_model(source).model
    assert str(find_layers(model)[0].layout.dtype) == f"torch.{published(name)['torch_dtype']}"
    apply(model, load_plan(tmp_path / "plan.json"))
    assert torch.equal(logits_of(load_model(tmp_path / "balanced").model), logits_of(model))


@pytest.mark.parametrize("name", SMALL)
def test_size_is_the_published_one(name: str):
    found = memory.memory(memory.CONFIGS / name)
    assert round(found["parameters"] / 1e9, 2 if SMALL[name][1] < 2 else 1) == SMALL[name][1]
    assert found["experts"] == SMALL[name][2]
    assert found["expert_weights"] == found["moe_layers"] * found["layer"] < found["weights"]
