"""The scripts of benchmarks/reference_moe, imported without leaving their plain names (`data`, `model`) behind."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")

FOLDER = Path(__file__).parents[2] / "benchmarks" / "reference_moe"


def _import_all() -> SimpleNamespace:
    names = [path.stem for path in FOLDER.glob("*.py")]
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, str(FOLDER))
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(FOLDER))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


scripts = _import_all()


def tiny_llama(vocabulary: int = 97) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        bos_token_id=1, eos_token_id=2, pad_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def trained_like(experts: int = 4, rank: int = 3, top_k: int = 2):
    """An upcycled tiny Llama with routers and differences that are not zero, and the dense model."""
    dense = tiny_llama()
    model = scripts.model.Upcycled(dense, experts, rank, top_k)
    with torch.no_grad():
        for name, parameter in model.trained():
            parameter.copy_(torch.randn_like(parameter) * (1.0 if name.endswith("router") else 0.2))
    return model, dense
