"""Mixtral's mathematics, arranged for training on one CPU core.

Replaces `MixtralForCausalLM` during training only; `export` writes the same weights as a Mixtral checkpoint
and `evaluate.py` checks that the logits agree.

    p = softmax(x Wr^T);  (w, i) = top-2(p);  w = w / sum(w);  y = sum_j w_j down_ij(silu(gate_ij x) * up_ij x)

What differs is the order of the work: tokens are sorted by expert once and each expert runs one bf16 matmul on
a contiguous slice. On this kind of machine (AMX) that took 93 ms a layer for 8,192 tokens, forward and
backward, against 328 ms for all experts as one wide matmul with the top-2 weights as a mask.

Shapes: B rows, S positions, T = B*S tokens, H hidden, E experts, I expert intermediate, k = 2, L layers.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM

CHUNK = 128  # rows of logits handled at once, 2 MB in float32
PAD_ROWS = 64  # few distinct matmul shapes: oneDNN compiles a kernel per shape, about 2 ms each


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm in float32, back in x's type: [..., H]."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(torch.bfloat16)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves layout as in transformers: x [B, heads, S, D], cos and sin [S, D]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class ShortAttention(torch.autograd.Function):
    """Causal attention that keeps the whole score table.

    For 16 rows of 256 positions 25 ms of processor time a layer, forward and backward; the CPU's flash kernel took 39.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Softmax(scale q k^T + causal mask) v: [B, heads, S, D] each."""
        s = q.shape[-2]
        mask = torch.full((s, s), float("-inf"), dtype=q.dtype).triu(1)
        p = torch.softmax((q @ k.transpose(-1, -2)).mul_(scale).add_(mask), dim=-1)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale = scale
        return p @ v

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of q, k, v."""
        q, k, v, p = ctx.saved_tensors
        ds = torch._softmax_backward_data(g @ v.transpose(-1, -2), p, -1, p.dtype).mul_(ctx.scale)
        return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ g, None


@torch.compiler.disable
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention: [B, heads, S, D] each."""
    if q.shape[-2] <= 256:
        return ShortAttention.apply(q, k, v, q.shape[-1] ** -0.5)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attention(
    x: Tensor,
    norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    eps: float,
) -> Tensor:
    """Norm, causal grouped-query attention and residual: [B, S, H] -> [B, S, H]."""
    b, s, h = x.shape
    d = h // heads
    y = rms_norm(x, norm, eps)
    query = rotate(F.linear(y, q).view(b, s, heads, d).transpose(1, 2), cos, sin)
    key = rotate(F.linear(y, k).view(b, s, kv_heads, d).transpose(1, 2), cos, sin)
    value = F.linear(y, v).view(b, s, kv_heads, d).transpose(1, 2)
    key, value = (z.repeat_interleave(heads // kv_heads, dim=1) for z in (key, value))
    y = attend(query, key, value)
    return x + F.linear(y.transpose(1, 2).reshape(b, s, h), o)


def route(x: Tensor, norm: Tensor, router: Tensor, k: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norm and router: x [T, H] -> normed [T, H], logits [T, E], weights [T, k], chosen [T, k]."""
    y = rms_norm(x, norm, eps)
    logits = F.linear(y, router).float()
    top, chosen = torch.softmax(logits, dim=-1).topk(k, dim=-1)
    return y, logits, top / top.sum(-1, keepdim=True), chosen


def experts(y: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sparse experts: y [T, H], weights and chosen [T, k], gate_up [E, 2I, H], down [E, H, I] -> [T, H]."""
    t, k = chosen.shape
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=gate_up.shape[0])
    padded = (counts + PAD_ROWS - 1) // PAD_ROWS * PAD_ROWS
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)  # padded start less unpadded start, [E]
    place = torch.arange(t * k) + shift[flat[order]]
    sizes = padded.tolist()
    source = torch.zeros(sum(sizes), dtype=torch.long)  # padding rows read token 0; nothing reads their result
    source[place] = order // k
    inverse = torch.empty_like(order)
    inverse[order] = place
    slices = y.index_select(0, source).split(sizes)
    wide = torch.cat([F.linear(part, w) for part, w in zip(slices, gate_up.unbind(0), strict=True)])
    inner = swiglu(wide).split(sizes)
    out = torch.cat([F.linear(part, w) for part, w in zip(inner, down.unbind(0), strict=True)])
    out = out.index_select(0, inverse).view(t, k, -1)  # gather back: cheaper than index_add
    return combine(out, weights)


def swiglu(wide: Tensor) -> Tensor:
    """silu(gate) * up: [P, 2I] -> [P, I]."""
    gate, up = wide.chunk(2, dim=-1)
    return F.silu(gate) * up


def combine(out: Tensor, weights: Tensor) -> Tensor:
    """Sum of a token's k expert outputs by the router's weights: [T, k, H], [T, k] -> [T, H]."""
    return (out * weights.to(out.dtype)[..., None]).sum(1)


class CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of bf16 logits whose gradient is made in the forward pass, a cache-sized chunk at a time.

    The stock function writes the [T, V] table in float32 several times, which took a third of a step.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits [T, V], targets [T] -> scalar, float32."""
        grad, total = torch.empty_like(logits), logits.new_zeros((), dtype=torch.float32)
        buffer = torch.empty(CHUNK, logits.shape[1])
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            index = targets[part, None]
            wide = buffer[: len(index)].copy_(logits[part])
            lse = wide.logsumexp(-1, keepdim=True)
            total += (lse - wide.gather(1, index)).sum()
            probability = wide.sub_(lse).exp_()
            probability.scatter_add_(1, index, probability.new_full(index.shape, -1.0))
            grad[part] = probability.div_(len(targets))
        ctx.save_for_backward(grad)
        return total / len(targets)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        """The saved gradient; `upstream` must be 1, as the loss is the root of the graph."""
        return ctx.saved_tensors[0], None


class Layer(nn.Module):
    """Weights of one decoder layer, under Mixtral's shapes."""

    def __init__(self, c: MixtralConfig) -> None:
        super().__init__()
        h, e, i = c.hidden_size, c.num_local_experts, c.intermediate_size
        kv = h * c.num_key_value_heads // c.num_attention_heads
        residual = 0.02 / math.sqrt(2 * c.num_hidden_layers)  # GPT-2: keeps the residual stream's variance flat

        def normal(*shape: int, std: float = 0.02) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) * std)

        self.norm1, self.norm2 = nn.Parameter(torch.ones(h)), nn.Parameter(torch.ones(h))
        self.q, self.k, self.v = normal(h, h), normal(kv, h), normal(kv, h)
        self.o = normal(h, h, std=residual)
        self.router = normal(e, h)
        self.gate_up, self.down = normal(e, 2 * i, h), normal(e, h, i, std=residual)

    @torch.no_grad()
    def centre_router(self) -> None:
        """Removes from each router row its component along the mean of the last batch's inputs."""
        mean = F.normalize(self.input_mean, dim=0)
        self.router -= torch.outer(self.router @ mean, mean)


class TrainingModel(nn.Module):
    """The model: float32 master weights, bf16 arithmetic by explicit casts, tied embeddings."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Parameter(torch.randn(config.vocab_size, config.hidden_size) * 0.02)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        dim = config.hidden_size // config.num_attention_heads
        inverse = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), inverse).repeat(1, 2)
        self.register_buffer("cos", angles.cos().to(torch.bfloat16), persistent=False)
        self.register_buffer("sin", angles.sin().to(torch.bfloat16), persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor]]:
        """Runs the model.

        Args:
            ids: [B, S] int64.

        Returns:
            Logits [T, V] bf16, router logits of each layer ([T, E]), chosen experts of each layer ([T, k]).
        """
        c, (b, s) = self.config, ids.shape
        cos, sin = self.cos[:s], self.sin[:s]
        x = F.embedding(ids, self.embed).to(torch.bfloat16)
        router_logits, choices = [], []
        for w in self.layers:
            q, k, v, o = (p.to(torch.bfloat16) for p in (w.q, w.k, w.v, w.o))
            x = attention(
                x, w.norm1, q, k, v, o, cos, sin, c.num_attention_heads, c.num_key_value_heads, c.rms_norm_eps
            )
            y, logits, weights, chosen = route(
                x.view(b * s, -1), w.norm2, w.router.to(torch.bfloat16), c.num_experts_per_tok, c.rms_norm_eps
            )
            w.input_mean = y.detach().float().mean(0)
            out = experts(y, weights, chosen, w.gate_up.to(torch.bfloat16), w.down.to(torch.bfloat16))
            x = x + out.view_as(x)
            router_logits.append(logits)
            choices.append(chosen)
        hidden = rms_norm(x, self.norm, c.rms_norm_eps).view(b * s, -1)
        return F.linear(hidden, self.embed.to(torch.bfloat16)), tuple(router_logits), choices


def export(model: TrainingModel, out: Path) -> None:
    """Writes the weights as a bf16 Mixtral checkpoint: config, generation_config, model.safetensors."""
    hf = MixtralForCausalLM(model.config)
    state = {"model.embed_tokens.weight": model.embed, "lm_head.weight": model.embed, "model.norm.weight": model.norm}
    for i, w in enumerate(model.layers):
        prefix = f"model.layers.{i}."
        state |= {
            f"{prefix}input_layernorm.weight": w.norm1,
            f"{prefix}post_attention_layernorm.weight": w.norm2,
            f"{prefix}mlp.gate.weight": w.router,
            f"{prefix}mlp.experts.gate_up_proj": w.gate_up,
            f"{prefix}mlp.experts.down_proj": w.down,
        } | {f"{prefix}self_attn.{n}_proj.weight": getattr(w, n) for n in "qkvo"}
    hf.load_state_dict(state, strict=True)
    hf.tie_weights()
    hf.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        max_new_tokens=64,
    )
    hf.to(torch.bfloat16).save_pretrained(out)


def compile_parts() -> None:
    """Compiles the element-wise parts; the experts' matmuls change shape with every batch and stay eager."""
    for name in ("attention", "route", "combine"):
        globals()[name] = torch.compile(globals()[name], dynamic=False)
    globals()["swiglu"] = torch.compile(swiglu, dynamic=True)
