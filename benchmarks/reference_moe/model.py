"""The mixture during training: every expert is the frozen dense FFN plus its own low-rank difference.

    expert e:   h_e = silu(g + dg_e) * (u + du_e),   [g; u] = W_in x,   [dg_e; du_e] = B_e^T (A_e x)
                y_e = W_out h_e + D_e^T (C_e h_e)
    layer:      y   = sum over the k selected experts of w_e y_e,   w = softmax(router x), largest k, sum 1

An expert may lack neurons (`keep`, see neurons.py): its h_e is zero there. Only the routers and the factors A, B, C, D
(`in_a`, `in_b`, `out_a`, `out_b`) are trained. A plain mixture would run
the dense matrices k times a token and gather tokens by expert. Here the dense matrices are shared: W_in is applied
once, and W_out once, to the weighted sum of the h_e. The low-rank part is one product over the factors of all experts
with those that a token did not select masked to zero, so nothing is gathered. `merged` gives the weights of the
equivalent Mixtral layer, in which none of this is left.

The rest is a Llama decoder layer as transformers has it, written as one function so that the compiler fuses what is
bound by memory traffic: that, not arithmetic, is half of the time of a step of a model as small as this.

B windows, W tokens of a window, N = B W tokens, H hidden size, I intermediate size, E experts, k selected, R rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from equipoise.errors import InputError

FACTORS = ("in_a", "in_b", "out_a", "out_b")


class Layer(nn.Module):
    """A decoder layer: frozen weights of the dense model as buffers, router and factors as float32 parameters.

    Attributes:
        keep: bool [E, I], neurons that an expert has.
        router: [E, H].
        in_a: [E R, H], in_b: [E R, 2 I], out_a: [E R, I], out_b: [E R, H]; an expert owns R rows of each. The b
            start at zero, so every expert starts as the dense FFN.
    """

    def __init__(self, layer: Any, experts: int, rank: int) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        width, hidden = mlp.gate_proj.weight.shape
        frozen = {
            "norm_1": layer.input_layernorm.weight,
            "qkv": torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
            "out": attention.o_proj.weight,
            "norm_2": layer.post_attention_layernorm.weight,
            "base_in": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            "base_out": mlp.down_proj.weight,
        }
        for name, weight in frozen.items():
            self.register_buffer(name, weight.detach())
        self.frozen = tuple(frozen)
        self.experts, self.rank = experts, rank
        self.register_buffer("keep", torch.ones(experts, width, dtype=torch.bool))
        self.router = nn.Parameter(torch.zeros(experts, hidden))
        self.in_a = nn.Parameter(torch.randn(experts * rank, hidden) / hidden**0.5)
        self.in_b = nn.Parameter(torch.zeros(experts * rank, 2 * width))
        self.out_a = nn.Parameter(torch.randn(experts * rank, width) / width**0.5)
        self.out_b = nn.Parameter(torch.zeros(experts * rank, hidden))

    def weights(self) -> list[torch.Tensor]:
        """The frozen ones, in the order in which `attend` and the FFNs take them."""
        return [getattr(self, name) for name in self.frozen]

    @torch.no_grad()
    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of each expert: gate and up [E, 2 I, H], down [E, H, I]; zeros where neurons are missing.

        In float64: the order of a product's sums differs between processors, and rounded to bfloat16 afterwards the
        weights are the same bits on all of them.
        """
        parts = {n: getattr(self, n).double().view(self.experts, self.rank, -1) for n in FACTORS}
        keep = self.keep.double()
        return (
            (self.base_in.double() + parts["in_b"].transpose(1, 2) @ parts["in_a"]) * keep.repeat(1, 2)[:, :, None],
            (self.base_out.double() + parts["out_b"].transpose(1, 2) @ parts["out_a"]) * keep[:, None],
        )


class Upcycled(nn.Module):
    """A Llama whose FFNs are mixtures.

    Args:
        dense: `LlamaForCausalLM` with tied embeddings.
        experts: E.
        rank: R.
        top_k: k.
        compiled: fuse with torch.compile (needs a C++ compiler).
    """

    def __init__(self, dense: Any, experts: int, rank: int, top_k: int, compiled: bool = False) -> None:
        super().__init__()
        config = dense.config
        self.experts, self.rank, self.top_k = experts, rank, top_k
        self.shape = (config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps)
        self.register_buffer("embedding", dense.model.embed_tokens.weight.detach())
        self.register_buffer("norm", dense.model.norm.weight.detach())
        self.rotary = dense.model.rotary_emb
        self.layers = nn.ModuleList(Layer(layer, experts, rank) for layer in dense.model.layers)
        wrap: Callable[[Any], Any] = (
            functools.partial(torch.compile, dynamic=False) if compiled else (lambda function: function)
        )
        self.dense_layer, self.mixture_layer = wrap(dense_layer), wrap(mixture_layer)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and tensor of all that is trained: `<layer>.router`, `<layer>.in_a` and so on."""
        for number, layer in enumerate(self.layers):
            for name in ("router", *FACTORS):
                yield f"{number}.{name}", getattr(layer, name)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the mixture.

        Args:
            ids: int64 [B, W], every window full.

        Returns:
            Final hidden states [B, W, H] after the last norm; the layers' mean balancing loss; counts int64 [L, B, E].
        """
        x, cos, sin = self._start(ids)
        balance, loads = [], []
        for layer in self.layers:
            factors = [getattr(layer, name).to(x.dtype) for name in FACTORS]
            x, own, load = self.mixture_layer(
                x, cos, sin, *layer.weights(), layer.keep, layer.router, *factors, self.shape, self.top_k
            )
            balance.append(own)
            loads.append(load)
        return rms(x, self.norm, self.shape[2]), torch.stack(balance).mean(), torch.stack(loads)

    @torch.no_grad()
    def dense(self, ids: torch.Tensor, inputs: list[torch.Tensor] | None = None) -> torch.Tensor:
        """The dense model's final hidden states [B, W, H]; the FFN inputs [N, H] of each layer go to `inputs`."""
        x, cos, sin = self._start(ids)
        for layer in self.layers:
            x, seen = self.dense_layer(x, cos, sin, *layer.weights(), self.shape)
            if inputs is not None:
                inputs.append(seen)
        return rms(x, self.norm, self.shape[2])

    def _start(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = functional.embedding(ids, self.embedding)
        cos, sin = self.rotary(x, torch.arange(ids.shape[1], device=ids.device)[None])
        return x, cos, sin


def fill(upcycled: Upcycled, weights: dict[str, torch.Tensor]) -> None:
    """Put the artifact's weights in; a layer without `keep` there keeps what it has.

    Raises:
        InputError: names or shapes differ.
    """
    named = dict(upcycled.trained())
    keeps = {f"{n}.keep": layer.keep for n, layer in enumerate(upcycled.layers)}
    named |= {name: keep for name, keep in keeps.items() if name in weights}
    if named.keys() != weights.keys() or any(named[n].shape != w.shape for n, w in weights.items()):
        raise InputError(
            f"the artifact does not fit the dense model ({len(named)} tensors expected, {len(weights)} read)"
        )
    with torch.no_grad():
        for name, weight in weights.items():
            named[name].copy_(weight)


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Llama's norm, in float32."""
    y = x.float()
    return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def attend(x, cos, sin, norm, qkv, out, shape):  # type: ignore[no-untyped-def]
    """Causal grouped-query attention with rotary positions, residual added: [B, W, H] to [B, W, H].

    Explicit products: at 256 tokens they are several times faster backwards than the CPU's flash attention.
    """
    heads, kv, eps = shape
    size, (b, w, _) = qkv.shape[0] // (heads + 2 * kv), x.shape
    mixed = functional.linear(rms(x, norm, eps), qkv).view(b, w, heads + 2 * kv, size).transpose(1, 2)
    q, k, v = mixed.split([heads, kv, kv], 1)
    q, k = (y * cos[:, None] + _turn(y) * sin[:, None] for y in (q, k))
    # the query heads of a group stand one below the other, so that keys are not repeated
    scores = (q.reshape(b, kv, heads // kv * w, size) @ k.transpose(2, 3)).view(b, kv, heads // kv, w, w)
    later = torch.ones(w, w, dtype=torch.bool, device=x.device).triu(1)
    share = (scores.float() * size**-0.5).masked_fill(later, float("-inf")).softmax(-1).to(x.dtype)
    y = (share.view(b, kv, -1, w) @ v).view(b, heads, w, size).transpose(1, 2).reshape(b, w, heads * size)
    return x + functional.linear(y, out)


def _turn(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


def dense_layer(x, cos, sin, norm_1, qkv, out, norm_2, base_in, base_out, shape):  # type: ignore[no-untyped-def]
    """A layer of the dense model: its output [B, W, H] and its FFN's input [N, H]."""
    x = attend(x, cos, sin, norm_1, qkv, out, shape)
    seen = rms(x, norm_2, shape[2])
    gate, up = functional.linear(seen, base_in).chunk(2, -1)
    return x + functional.linear(functional.silu(gate) * up, base_out), seen.flatten(0, 1)


def mixture_layer(  # type: ignore[no-untyped-def]
    x, cos, sin, norm_1, qkv, out, norm_2, base_in, base_out, keep, router, in_a, in_b, out_a, out_b, shape, top_k
):
    """A layer of the mixture.

    Returns:
        Output [B, W, H]; the balancing loss of Switch Transformer (E times the sum over experts of share of selections
        times mean probability, 1 when even); selections of each window int64 [B, E].
    """
    x = attend(x, cos, sin, norm_1, qkv, out, shape)
    y = rms(x, norm_2, shape[2]).flatten(0, 1)
    experts, rank = router.shape[0], in_a.shape[0] // router.shape[0]
    probabilities = functional.linear(y.float(), router).softmax(-1)
    weights, chosen = probabilities.topk(top_k, -1)
    weights = (weights / weights.sum(-1, keepdim=True)).to(y.dtype)
    selected = chosen[:, :, None] == torch.arange(experts, device=y.device)  # [N, k, E]
    mask = selected.to(y.dtype).repeat_interleave(rank, -1)  # [N, k, E R]
    own = (functional.linear(y, in_a)[:, None] * mask) @ in_b
    gate, up = (functional.linear(y, base_in)[:, None] + own).chunk(2, -1)
    h = functional.silu(gate) * up * keep[chosen].to(y.dtype)  # [N, k, I]
    low = (functional.linear(h, out_a) * mask * weights[:, :, None]).sum(1)
    y = functional.linear((h * weights[:, :, None]).sum(1), base_out) + low @ out_b
    load = selected.sum(1).view(*x.shape[:2], experts).sum(1)
    balance = experts * (load.sum(0) / load.sum() * probabilities.mean(0)).sum()
    return x + y.view_as(x), balance, load
