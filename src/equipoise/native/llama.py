"""Llama with feed-forward blocks that a family chooses layer by layer, and how such a family is registered.

Attention, norms, rotary embedding, cache, forward and `generate` are transformers' own, and so are the experts: the
fused tensors of Qwen2-MoE, `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I], behind the experts interface.

E experts, H hidden, I width of an expert.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts


class RoutedPreTrainedModel(LlamaPreTrainedModel):
    """What the models of a family with and without a head share."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Qwen2MoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, Router):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=std)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Yes. transformers looks for its decorator in the source of this module; the experts come from another."""
        return True


class Router(nn.Module):
    """Base of the gates: T rows of H -> (logits [T, E], weights [T, k], index int64 [T, k])."""


class RoutedModel(RoutedPreTrainedModel, LlamaModel):
    """A Llama whose layers have the blocks that `block_of` gives them."""

    @staticmethod
    def block_of(config: Any, layer: int) -> nn.Module | None:
        """The block of experts of a decoder layer; None: it keeps Llama's dense one."""
        raise NotImplementedError

    def __init__(self, config: Any) -> None:
        LlamaPreTrainedModel.__init__(self, config)  # LlamaModel's would build dense layers only
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(self._layer(config, number) for number in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def _layer(self, config: Any, number: int) -> LlamaDecoderLayer:
        layer = LlamaDecoderLayer(config, number)
        block = self.block_of(config, number)
        if block is not None:
            layer.mlp = block  # type: ignore[assignment]
        return layer


class RoutedForCausalLM(RoutedPreTrainedModel, LlamaForCausalLM):
    """The same with a language-model head."""

    model_class: ClassVar[type[RoutedModel]]

    def __init__(self, config: Any) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def register_family(causal: type[RoutedForCausalLM], experts_on_disk: dict[str, str] | None = None) -> None:
    """Register a family's classes with the Auto classes, and the names of its experts on disk.

    Args:
        causal: the class with a head; it knows the one without.
        experts_on_disk: `gate_proj`, `up_proj` and `down_proj` -> regular expression of what they are called, with
            one group for the number of the expert; None: `mlp.experts.<number>.gate_proj.weight` and so on.
    """
    config: Any = causal.config_class
    AutoModel.register(config, causal.model_class, exist_ok=True)
    AutoModelForCausalLM.register(config, causal, exist_ok=True)
    rules: list[WeightTransform] = []
    for name, pattern in (experts_on_disk or {}).items():
        rules.append(WeightRenaming(pattern, rf"mlp.experts.\1.{name}.weight"))
    rules.append(
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        )
    )
    rules.append(
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        )
    )
    register_checkpoint_conversion_mapping(config.model_type, rules, overwrite=True)  # type: ignore[arg-type]
