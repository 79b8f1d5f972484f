"""Which neurons of the dense FFN an expert keeps: each loses those that its own tokens use least beside the others'.

    c[e, i] = |W_out[:, i]| sqrt( sum over tokens of e of (w h_i)^2 )      what neuron i adds for the tokens of expert e
    score   = c[e, i] / (mean over e of c[e, i])                            relative: whose neuron it is

Without this an expert is the dense FFN with a small difference, and a token that is sent elsewhere loses nothing:
experts differ in name only. A neuron that is missing has to be learnt anew by the differences, for the tokens that go
there, so experts part in training (Drop-Upcycling, arXiv 2502.19261, draws them at random and starts them afresh;
here there is neither the time to train them nor a bias to choose them).

N tokens, H hidden size, I intermediate size, E experts, k selected.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def usage(
    inputs: torch.Tensor, router: torch.Tensor, base_in: torch.Tensor, base_out: torch.Tensor, top_k: int
) -> torch.Tensor:
    """`c` above for one layer, from the dense FFN and the layer's router.

    Args:
        inputs: [N, H], what enters the FFN.
        router: [E, H].
        base_in: [2 I, H], gate and up.
        base_out: [H, I].
        top_k: k.

    Returns:
        float32 [E, I].
    """
    weights, chosen = functional.linear(inputs.float(), router.float()).softmax(-1).topk(top_k, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    gate, up = functional.linear(inputs, base_in).float().chunk(2, -1)
    squares = (functional.silu(gate) * up).pow(2)
    share = torch.zeros(len(inputs), len(router), device=inputs.device).scatter_(1, chosen, weights.pow(2))
    return (share.T @ squares).sqrt() * base_out.float().norm(dim=0)


def kept(used: torch.Tensor, drop: float) -> torch.Tensor:
    """Neurons each expert keeps: bool [E, I], the same number in every row.

    Args:
        used: [E, I] from `usage`.
        drop: share of the neurons that every expert loses.
    """
    score = used / used.mean(0, keepdim=True).clamp(min=1e-30)
    lost = score.argsort(dim=-1, stable=True)[:, : round(drop * used.shape[1])]
    return torch.ones_like(used, dtype=torch.bool).scatter_(1, lost, False)
