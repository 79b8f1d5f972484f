"""Native families against a reference in plain operations, from files in the published layout, and back into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from native_reference import State, logits_of, random_state
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import equipoise
from core_models import fresh_process
from equipoise.checkpoint import apply_checkpoint
from equipoise.errors import InputError
from equipoise.models.loading import empty_model, find_source, load_model
from equipoise.planning import plan
from equipoise.profiling import profile
from equipoise.runtime import apply
from tiny import tiny_tokenizer

_LLAMA = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
_DEEPSEEK: dict[str, Any] = _LLAMA | {
    "model_type": "deepseek",
    "architectures": ["DeepseekForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
}
_LLAMA_MOE: dict[str, Any] = _LLAMA | {
    "model_type": "llama_moe",
    "architectures": ["LlamaMoEForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_llama_moe.LlamaMoEConfig",
        "AutoModelForCausalLM": "modeling_llama_moe_hf.LlamaMoEForCausalLM",
    },
    "intermediate_size": 192,
    "num_experts": 8,
    "num_selects": 2,
    "size_experts": [[24] * 8] * 3,
    "gate_network": "mlp",
    "gate_use_softmax": True,
    "gate_add_noise": True,
    "multiply_gate_scores": True,
    "score_scale_factor": 4.0,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek": _DEEPSEEK,
    "deepseek-every-second-normalised": _DEEPSEEK
    | {
        "num_hidden_layers": 5,
        "n_routed_experts": 16,
        "num_experts_per_tok": 3,
        "n_shared_experts": None,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 2,
        "norm_topk_prob": True,
    },
    "llama-moe-8": _LLAMA_MOE,
    "llama-moe-16": _LLAMA_MOE | {"num_experts": 16, "num_selects": 4, "size_experts": [[12] * 16] * 3},
    "llama-moe-linear-gate": _LLAMA_MOE
    | {
        "gate_network": "linear",
        "gate_use_softmax": False,
        "gate_add_noise": False,
        "score_scale_factor": [4.0, 2.0, 3.0],
    },
    "llama-moe-plain-sum": _LLAMA_MOE | {"multiply_gate_scores": False, "size_experts": None},
}
IDS = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(1))


def write(path: Path, config: dict[str, Any]) -> State:
    """A checkpoint as the authors published it; returns its tensors."""
    path.mkdir()
    state = random_state(config)
    save_file(state, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tiny_tokenizer().save_pretrained(path)
    return state


def compared(model: Any, state: State, config: dict[str, Any]) -> None:
    with torch.no_grad():
        found = model(input_ids=IDS).logits.double()
    wanted = logits_of(state, config, IDS)
    assert wanted.abs().max() > 1
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_reference(name: str, tmp_path: Path):
    state = write(tmp_path / "model", CONFIGS[name])
    compared(load_model(tmp_path / "model").model, state, CONFIGS[name])


@pytest.mark.parametrize("name", ["deepseek", "llama-moe-16"])
def test_it_saves_under_the_published_names_again(name: str, tmp_path: Path):
    state = write(tmp_path / "model", CONFIGS[name])
    AutoModelForCausalLM.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    wanted = {key: tensor for key, tensor in state.items() if "inv_freq" not in key}
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[key], wanted[key]) for key in wanted)
    config = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    assert {key: config[key] for key in ("architectures", "model_type")} == {
        key: CONFIGS[name][key] for key in ("architectures", "model_type")
    }


def test_bin_files_become_safetensors(tmp_path: Path):
    """LLaMA-MoE is published as pytorch_model.bin: refused, with the way out that docs/checkpoints.md shows."""
    config = CONFIGS["llama-moe-8"]
    state = write(tmp_path / "bin", config)
    (tmp_path / "bin" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no safetensors weights; convert it with save_pretrained"):
        apply_checkpoint(tmp_path / "bin", _plan_of(config, tmp_path), tmp_path / "out")
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    AutoModelForCausalLM.from_pretrained(tmp_path / "bin", dtype="auto").save_pretrained(tmp_path / "model")
    compared(load_model(tmp_path / "model", tokenizer=False).model, state, config)


def _plan_of(config: dict[str, Any], folder: Path) -> Any:
    write(folder / "source", config)
    model = load_model(folder / "source").model
    return plan(profile(model, [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]))


@pytest.mark.parametrize("name", ["deepseek", "llama-moe-8"])
def test_a_balanced_checkpoint_loads_after_the_import_alone(name: str, tmp_path: Path):
    made = _plan_of(CONFIGS[name], tmp_path)
    assert made.num_replicas > 0
    apply_checkpoint(tmp_path / "source", made, tmp_path / "balanced")
    model = load_model(tmp_path / "source").model
    apply(model, made)
    with torch.no_grad():
        torch.save(model(input_ids=IDS).logits, tmp_path / "logits.pt")
    torch.save(IDS, tmp_path / "ids.pt")
    code = (
        "import sys, torch, equipoise; from transformers import AutoModelForCausalLM, AutoTokenizer;"
        "path = sys.argv[1]; torch.set_num_threads(int(sys.argv[2]));"
        "words = AutoTokenizer.from_pretrained(path + '/balanced');"
        "model = AutoModelForCausalLM.from_pretrained(path + '/balanced').eval();"
        "ids, wanted = torch.load(path + '/ids.pt'), torch.load(path + '/logits.pt');"
        "print(len(words), float((model(input_ids=ids).logits - wanted).detach().abs().max()))"
    )
    done = fresh_process(code, tmp_path, torch.get_num_threads())
    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stdout.split() == ["128", "0.0"]


def test_generation_with_a_cache_is_that_without(tmp_path: Path):
    write(tmp_path / "model", CONFIGS["deepseek"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    found = [
        model.generate(input_ids=IDS, do_sample=False, max_new_tokens=5, min_new_tokens=5, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*found)
    body = AutoModel.from_pretrained(tmp_path / "model")
    assert type(body).__name__ == "DeepseekModel"


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        ("deepseek", {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is unknown"),
        ("llama-moe-8", {"gate_type": "SwitchBalancedGate"}, "gate_type 'SwitchBalancedGate' of llama_moe"),
        ("llama-moe-8", {"calculator_type": "SwitchDropTokenCalculator"}, "only 'UniversalCalculator'"),
        ("llama-moe-8", {"add_weight_norm": True}, "add_weight_norm True"),
        ("llama-moe-8", {"size_experts": [[24] * 8, [20] * 4 + [28] * 4, [24] * 8]}, "size_experts of layer 1"),
        ("llama-moe-8", {"num_experts": 7}, "does not divide into 7 experts"),
        ("llama-moe-8", {"num_selects": "two"}, "num_selects"),
    ],
)
def test_what_is_not_computed_is_refused(name: str, change: dict[str, Any], line: str, tmp_path: Path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIGS[name] | change), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        empty_model(find_source(path))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dense_deepseek_has_nothing_to_balance(tmp_path: Path):
    (tmp_path / "config.json").write_text(
        json.dumps(_DEEPSEEK | {"n_routed_experts": None, "n_shared_experts": None}), encoding="utf-8"
    )
    with pytest.raises(InputError, match="not a Mixture-of-Experts model"):
        empty_model(find_source(tmp_path))


def test_registration_repeats():
    from equipoise.native import register

    register()
    register()
    assert type(AutoConfig.for_model("llama_moe")).__module__ == "equipoise.native.configurations"
    assert equipoise.__version__
