"""DeepSeek-MoE and LLaMA-MoE in plain operations on the published tensors, and random tensors in that layout.

Nothing of equipoise or of transformers' models is used: one loop over layers, rows and selected experts, in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

State = dict[str, torch.Tensor]

_ATTENTION = {"q_proj": "heads", "k_proj": "kv", "v_proj": "kv"}


def random_state(config: dict[str, Any], seed: int = 0) -> State:
    """float32 tensors under the published names; gates strong enough to spread the tokens."""
    draw = torch.Generator().manual_seed(seed)
    wide, layers = config["hidden_size"], config["num_hidden_layers"]
    head = wide // config["num_attention_heads"]
    out: State = {}

    def matrix(name: str, rows: int, columns: int, std: float = 0.15) -> None:
        out[name] = torch.randn(rows, columns, generator=draw) * std

    def norm(name: str) -> None:
        out[name] = 1 + 0.1 * torch.randn(wide, generator=draw)

    def mlp(prefix: str, inner: int) -> None:
        matrix(f"{prefix}.gate_proj.weight", inner, wide)
        matrix(f"{prefix}.up_proj.weight", inner, wide)
        matrix(f"{prefix}.down_proj.weight", wide, inner)

    matrix("model.embed_tokens.weight", config["vocab_size"], wide, 1.0)
    matrix("lm_head.weight", config["vocab_size"], wide)
    norm("model.norm.weight")
    for i in range(layers):
        layer = f"model.layers.{i}"
        norm(f"{layer}.input_layernorm.weight")
        norm(f"{layer}.post_attention_layernorm.weight")
        for part, kind in _ATTENTION.items():
            heads = config["num_attention_heads" if kind == "heads" else "num_key_value_heads"]
            matrix(f"{layer}.self_attn.{part}.weight", heads * head, wide)
        matrix(f"{layer}.self_attn.o_proj.weight", wide, wide)
        if config["model_type"] == "deepseek":
            if not is_moe(config, i):
                mlp(f"{layer}.mlp", config["intermediate_size"])
                continue
            matrix(f"{layer}.mlp.gate.weight", config["n_routed_experts"], wide, 0.5)
            for e in range(config["n_routed_experts"]):
                mlp(f"{layer}.mlp.experts.{e}", config["moe_intermediate_size"])
            if config["n_shared_experts"] is not None:
                mlp(f"{layer}.mlp.shared_experts", config["moe_intermediate_size"] * config["n_shared_experts"])
        else:
            # Of transformers 4.31, and on the hub; a buffer that every later version computes.
            out[f"{layer}.self_attn.rotary_emb.inv_freq"] = 1e4 ** (-torch.arange(0, head, 2) / head)
            experts, inner = config["num_experts"], config["intermediate_size"] // config["num_experts"]
            if config["gate_network"] == "mlp":
                matrix(f"{layer}.mlp.gate.gate_network.0.weight", experts, wide, 0.3)
                matrix(f"{layer}.mlp.gate.gate_network.2.weight", experts, experts, 1.0)
            else:
                matrix(f"{layer}.mlp.gate.gate_network.weight", experts, wide, 0.3)
            if config["gate_add_noise"]:
                matrix(f"{layer}.mlp.gate.weight_noise.weight", experts, wide)
            for e in range(experts):
                matrix(f"{layer}.mlp.calculator.experts.weight_gate.{e}", inner, wide)
                matrix(f"{layer}.mlp.calculator.experts.weight_up.{e}", inner, wide)
                matrix(f"{layer}.mlp.calculator.experts.weight_down.{e}", wide, inner)
    return out


def is_moe(config: dict[str, Any], layer: int) -> bool:
    """Whether a layer of DeepSeek-MoE has experts."""
    return layer >= config["first_k_dense_replace"] and layer % config["moe_layer_freq"] == 0


def logits_of(state: State, config: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """float64 [rows, length, vocabulary] of int64 ids [rows, length] without padding."""
    s = {name: tensor.double() for name, tensor in state.items()}
    x = s["model.embed_tokens.weight"][ids]
    block = _deepseek if config["model_type"] == "deepseek" else _llama_moe
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        x = x + _attention(s, config, layer, _norm(x, s[f"{layer}.input_layernorm.weight"], config))
        h = _norm(x, s[f"{layer}.post_attention_layernorm.weight"], config)
        x = x + torch.stack([torch.stack([block(s, config, i, token) for token in row]) for row in h])
    return _norm(x, s["model.norm.weight"], config) @ s["lm_head.weight"].T


def _norm(x: torch.Tensor, weight: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()


def _attention(s: State, config: dict[str, Any], layer: str, h: torch.Tensor) -> torch.Tensor:
    rows, length, wide = h.shape
    head = wide // config["num_attention_heads"]

    def heads(part: str) -> torch.Tensor:
        return (h @ s[f"{layer}.self_attn.{part}.weight"].T).view(rows, length, -1, head).transpose(1, 2)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(0, head, 2, dtype=torch.float64)
        angle = torch.arange(length, dtype=torch.float64)[:, None] * config["rope_theta"] ** (-steps / head)
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    q, k, v = rotate(heads("q_proj")), rotate(heads("k_proj")), heads("v_proj")
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) / head**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, wide)
    return mixed @ s[f"{layer}.self_attn.o_proj.weight"].T


def _glu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return down @ (functional.silu(gate @ x) * (up @ x))


def _mlp(s: State, prefix: str, x: torch.Tensor) -> torch.Tensor:
    return _glu(x, *(s[f"{prefix}.{part}_proj.weight"] for part in ("gate", "up", "down")))


def _deepseek(s: State, config: dict[str, Any], i: int, x: torch.Tensor) -> torch.Tensor:
    prefix = f"model.layers.{i}.mlp"
    if not is_moe(config, i):
        return _mlp(s, prefix, x)
    p = (s[f"{prefix}.gate.weight"] @ x).softmax(-1)
    best = p.argsort(descending=True)[: config["num_experts_per_tok"]].tolist()
    total = float(p[best].sum()) if config["norm_topk_prob"] else 1.0
    y = sum(p[e] / total * _mlp(s, f"{prefix}.experts.{e}", x) for e in best)
    if config["n_shared_experts"] is not None:
        y = y + _mlp(s, f"{prefix}.shared_experts", x)
    return y


def _llama_moe(s: State, config: dict[str, Any], i: int, x: torch.Tensor) -> torch.Tensor:
    gate, experts = f"model.layers.{i}.mlp.gate.gate_network", f"model.layers.{i}.mlp.calculator.experts.weight"
    if config["gate_network"] == "mlp":
        scores = s[f"{gate}.2.weight"] @ torch.tanh(s[f"{gate}.0.weight"] @ x)
    else:
        scores = s[f"{gate}.weight"] @ x
    best = scores.argsort(descending=True)[: config["num_selects"]].tolist()
    weights = scores[best].softmax(-1) if config["gate_use_softmax"] else scores[best]
    scale = config["score_scale_factor"]
    weights = weights * (scale[i] if isinstance(scale, list) else scale)
    if not config["multiply_gate_scores"]:
        weights = torch.ones_like(weights)
    parts = [
        w * _glu(x, *(s[f"{experts}_{part}.{e}"] for part in ("gate", "up", "down")))
        for e, w in zip(best, weights, strict=True)
    ]
    return torch.stack(parts).sum(0)
