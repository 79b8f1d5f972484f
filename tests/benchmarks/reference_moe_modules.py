"""The scripts of benchmarks/reference_moe, and tiny models for them."""

import torch
from script_modules import BENCHMARKS, import_scripts
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = BENCHMARKS / "reference_moe"
scripts = import_scripts("reference_moe")


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
