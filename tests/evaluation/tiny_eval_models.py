"""A tiny tokenizer and tiny random models, made on the spot."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast, SwitchTransformersConfig
from transformers import SwitchTransformersForConditionalGeneration as Switch

SPECIAL = ["<pad>", "<s>", "</s>"]


def byte_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte (259 in all): every text has tokens, and they can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(SPECIAL + alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )


def tiny_mixtral(seed: int = 0, dtype: torch.dtype = torch.float32, positions: int = 256) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=positions,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return MixtralForCausalLM(config).to(dtype).eval()


def tiny_switch(seed: int = 0) -> Switch:
    torch.manual_seed(seed)
    config = SwitchTransformersConfig(
        vocab_size=259,
        d_model=32,
        d_kv=16,
        d_ff=32,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_decoder_layers=2,
        num_sparse_decoder_layers=1,
        num_heads=2,
        num_experts=4,
        expert_capacity=64,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    return Switch(config).eval()
