"""DeepSeek-MoE (arXiv 2401.06066): routed experts beside shared ones, after dense first layers.

    p = softmax(W x)            g = the k largest of p, as they are (or made to add up to 1)
    y = sum_e g_e expert_e(x) + shared(x)

Published as `model.layers.N.mlp.gate.weight`, `.mlp.experts.M.{gate,up,down}_proj.weight`,
`.mlp.shared_experts.*`, and `.mlp.{gate,up,down}_proj.weight` in dense layers.

T tokens, H hidden, E experts, k experts a token selects.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2MLP
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from equipoise.native.configurations import DeepseekConfig
from equipoise.native.llama import RoutedForCausalLM, RoutedModel, Router, register_family


class DeepseekRouter(Router):
    """Softmax over all experts in the dtype of the model, then the k largest."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From hidden [T, H]: logits [T, E], weights [T, k], index int64 [T, k]."""
        logits = functional.linear(hidden, self.weight)
        weights, index = torch.topk(logits.softmax(-1), self.top_k, dim=-1, sorted=False)
        if self.norm_topk_prob and self.top_k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights, index


class DeepseekMoE(nn.Module):
    """Routed experts, and the shared ones as one MLP of their joint width."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate = DeepseekRouter(config)
        self.experts = Qwen2MoeExperts(config)
        self.shared_experts = None
        if config.n_shared_experts is not None:
            width = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = DeepseekV2MLP(config, intermediate_size=width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same shape as hidden, [..., H]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weights, index = self.gate(flat)
        out = self.experts(flat, index, weights).reshape(hidden.shape)
        return out if self.shared_experts is None else out + self.shared_experts(hidden)


class DeepseekModel(RoutedModel):
    """DeepSeek-MoE without a head."""

    config_class = DeepseekConfig

    @staticmethod
    def block_of(config: Any, layer: int) -> nn.Module | None:
        """Experts where the configuration says so."""
        return DeepseekMoE(config) if config.is_moe_layer(layer) else None


class DeepseekForCausalLM(RoutedForCausalLM):
    """DeepSeek-MoE as a language model."""

    config_class = DeepseekConfig
    model_class: ClassVar[type[RoutedModel]] = DeepseekModel


register_family(DeepseekForCausalLM)
