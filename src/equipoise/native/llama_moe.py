"""LLaMA-MoE (arXiv 2406.16554): the feed-forward blocks of a Llama cut into experts.

    s = W2 tanh(W1 x)           the k largest of s are selected
    y = c * sum_e softmax(selected s)_e expert_e(x)

The factor c gives the block the scale it had before k of E parts were left of it. Published as
`model.layers.N.mlp.gate.gate_network.{0,2}.weight`, `.mlp.gate.weight_noise.weight` and
`.mlp.calculator.experts.weight_{gate,up,down}.M`.

T tokens, H hidden, E experts, k experts a token selects.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from equipoise.native.configurations import LlamaMoEConfig
from equipoise.native.llama import RoutedForCausalLM, RoutedModel, Router, register_family


class LlamaMoERouter(Router):
    """The authors' `TopKBalancedNoisyGate` without the noise of training."""

    def __init__(self, config: LlamaMoEConfig, scale: float) -> None:
        super().__init__()
        self.top_k = config.num_selects
        self.use_softmax = config.gate_use_softmax
        self.use_scores = config.multiply_gate_scores
        self.scale = scale
        wide, narrow = config.hidden_size, config.num_experts
        first = nn.Linear(wide, narrow, bias=False)
        self.gate_network: nn.Module = first
        if config.gate_network == "mlp":
            self.gate_network = nn.Sequential(first, nn.Tanh(), nn.Linear(narrow, narrow, bias=False))
        if config.gate_add_noise:
            self.weight_noise = nn.Linear(wide, narrow, bias=False)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From hidden [T, H]: logits [T, E], weights [T, k], index int64 [T, k]."""
        logits = self.gate_network(hidden)
        scores, index = torch.topk(logits, self.top_k, dim=-1)
        if not self.use_scores:
            return logits, torch.ones_like(scores), index
        if self.use_softmax:
            scores = torch.softmax(scores.float(), dim=-1).to(logits.dtype)
        return logits, scores * self.scale, index


class LlamaMoELayer(nn.Module):
    """Gate and experts; what the authors call the calculator is transformers' experts interface here."""

    def __init__(self, config: LlamaMoEConfig, scale: float) -> None:
        super().__init__()
        self.gate = LlamaMoERouter(config, scale)
        self.experts = Qwen2MoeExperts(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same shape as hidden, [..., H]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weights, index = self.gate(flat)
        return self.experts(flat, index, weights).reshape(hidden.shape)


class LlamaMoEModel(RoutedModel):
    """LLaMA-MoE without a head."""

    config_class = LlamaMoEConfig

    @staticmethod
    def block_of(config: Any, layer: int) -> nn.Module | None:
        """Every layer has experts."""
        scale = config.score_scale_factor
        return LlamaMoELayer(config, scale[layer] if isinstance(scale, list) else scale)


class LlamaMoEForCausalLM(RoutedForCausalLM):
    """LLaMA-MoE as a language model."""

    config_class = LlamaMoEConfig
    model_class: ClassVar[type[RoutedModel]] = LlamaMoEModel


register_family(
    LlamaMoEForCausalLM,
    {f"{kind}_proj": rf"mlp\.calculator\.experts\.weight_{kind}\.(\d+)" for kind in ("gate", "up", "down")},
)
