"""Muon for the matrices, AdamW for the rest (embedding, router, norms).

Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"): the momentum of each matrix
is replaced by the nearest orthogonal matrix, found by five Newton-Schulz steps. Here it is batched: an expert
weight [E, 2I, H] is 2E matrices. Not for the router: orthogonal updates would push it towards equal use of the
experts, and the demo model's routing must stay as uneven as the plain loss makes it.

Cost: about 16 GFLOP a step for the demo model, 5 % of a step of 8,192 tokens.
"""

import torch
from torch import Tensor


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz to the orthogonal factor: [N, R, C] float32 -> [N, R, C] bf16, all singular values near 1."""
    x = matrices.to(torch.bfloat16)
    flip = x.shape[-2] > x.shape[-1]
    x = x.mT.contiguous() if flip else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x.mT if flip else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    Parameters are [R, C] or [N, R, C]; a group with `halves` set holds gate and up stacked on R.
    """

    def __init__(self, groups: list[dict], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "halves": False})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter."""
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                rows = p.shape[-2] // 2 if group["halves"] else p.shape[-2]
                flat = orthogonalize(update.view(-1, rows, p.shape[-1]))
                scale = max(1.0, rows / p.shape[-1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(flat.reshape(p.shape), alpha=-group["lr"] * scale)
