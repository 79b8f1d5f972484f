"""Models that cannot be balanced are refused with the family and the reason, before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families_support import identity_slots, make_plan, shared_model
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from equipoise.checkpoint import apply_checkpoint
from equipoise.cli.main import run
from equipoise.errors import InputError
from equipoise.models import empty_model, find_layers
from equipoise.models.loading import auto_class, find_source
from equipoise.profiling import profile, watch
from equipoise.runtime import apply
from tiny import build, configure, save_tiny, tiny_tokenizer

# model_type -> configuration beyond the tiny sizes, and what the refusal must say.
_OUTSIDE = "outside transformers' experts interface"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({}, "not a Mixture-of-Experts model"),
    "qwen3": ({}, "not a Mixture-of-Experts model"),
    "t5": ({"d_kv": 8, "d_ff": 16, "num_layers": 2}, "not a Mixture-of-Experts model"),
    # A family that is supported, in a model that has no MoE layer.
    "qwen3_moe": ({"mlp_only_layers": [0, 1, 2]}, "not a Mixture-of-Experts model"),
    "dbrx": ({"d_model": 32, "n_heads": 4, "n_layers": 2, "attn_config": {"rope_theta": 1e4}}, _OUTSIDE),
    "doge": ({"is_moe": True, "num_experts": 16}, _OUTSIDE),
    "jetmoe": ({}, _OUTSIDE),
    "llama4_text": ({}, _OUTSIDE),
    "longcat_flash": ({"num_layers": 2, "expert_ffn_hidden_size": 16, "ffn_hidden_size": 32}, _OUTSIDE),
    "nllb-moe": (
        {"encoder_layers": 2, "decoder_layers": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
        _OUTSIDE,
    ),
    "step3p7": ({"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"]}}, _OUTSIDE),
}


def config_of(model_type: str) -> Any:
    config = configure(CONFIG_MAPPING[model_type], REFUSED[model_type][0])
    config.dtype = torch.float32
    return config


def skeleton(model_type: str) -> PreTrainedModel:
    config = config_of(model_type)
    with torch.device("meta"):
        return auto_class(config).from_config(config)


def check_line(error: InputError, model_type: str) -> None:
    line = str(error)
    assert "\n" not in line
    assert repr(model_type) in line
    assert REFUSED[model_type][1] in line


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_in_memory_is_refused(model_type: str):
    model = skeleton(model_type)
    plan = make_plan(shared_model("mixtral"), identity_slots)
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.int64), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    for attempt in (
        lambda: find_layers(model),
        lambda: watch(model).__enter__(),
        lambda: profile(model, [batch]),
        lambda: apply(model, plan),
    ):
        with pytest.raises(InputError) as caught:
            attempt()
        check_line(caught.value, model_type)


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_directory_is_refused_before_its_weights_are_read(model_type: str, tmp_path: Path, capsys: Any):
    """There is nothing but a configuration and a tokenizer, so a command that looked for weights first would say so."""
    path = tmp_path / "model"
    config_of(model_type).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    assert AutoConfig.from_pretrained(path).model_type == model_type
    with pytest.raises(InputError) as caught:
        empty_model(find_source(path))
    check_line(caught.value, model_type)
    with pytest.raises(InputError) as caught:
        apply_checkpoint(path, make_plan(shared_model("mixtral"), identity_slots), tmp_path / "out")
    check_line(caught.value, model_type)

    data = tmp_path / "text.txt"
    data.write_text("w5 w6 w7 " * 2000, encoding="utf-8")
    code = run(["profile", str(path), "--data", str(data), "--out", str(tmp_path / "p.npz")])
    captured = capsys.readouterr()
    assert code == 2
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert repr(model_type) in line
    assert REFUSED[model_type][1] in line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "p.npz").exists()


def test_the_plan_of_another_family_is_refused():
    plan = make_plan(shared_model("mixtral"), identity_slots)
    with pytest.raises(InputError, match="model_type 'mixtral', this one has 'olmoe'"):
        apply(build("olmoe"), plan)


def test_the_plan_of_another_precision_is_refused(tmp_path: Path):
    source = save_tiny(build("mixtral", dtype=torch.bfloat16), tmp_path / "model")
    with pytest.raises(InputError, match="dtype 'float32', this one has 'bfloat16'"):
        apply_checkpoint(source, make_plan(shared_model("mixtral"), identity_slots), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_balanced_model_takes_no_second_plan_and_no_profile():
    model = build("mixtral")
    plan = make_plan(model, identity_slots)
    apply(model, plan)
    with pytest.raises(InputError, match="has a plan already"):
        apply(model, plan)
    with pytest.raises(InputError, match="balanced already"):
        profile(model, [])


def test_layers_of_different_size_are_refused():
    model = build("qwen3_moe", num_hidden_layers=2)
    other = build("qwen3_moe", num_experts=4)
    model.model.layers[1].mlp.experts = other.model.layers[1].mlp.experts
    with pytest.raises(InputError, match=r"layers with \[4, 8\] experts"):
        find_layers(model)
