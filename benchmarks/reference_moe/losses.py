"""Cross-entropy and distillation on the output head, a few rows at a time: no [N, V] tensor is ever whole.

    loss = sum_i  alpha_i CE(target_i)  +  beta_i KL(teacher_i || model_i)          (nats)

The head is not trained, so the gradient to the hidden states is all that is needed and is computed with the loss:
`alpha (p - onehot) + beta (p - q)` times the head, p the model's and q the teacher's distribution.

N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch


def plain_step(logits: torch.Tensor, target: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy [n] of logits [n, V] and its weighted gradient to them."""
    logp = logits.float().log_softmax(-1)
    hit = torch.arange(logits.shape[1], device=logits.device) == target[:, None]
    return -(logp * hit).sum(-1), ((logp.exp() - hit.float()) * alpha[:, None]).to(logits.dtype)


def distil_step(
    logits: torch.Tensor, wanted: torch.Tensor, target: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy [n], divergence [n] from the teacher's logits `wanted` [n, V], and the weighted gradient."""
    logp, logq = logits.float().log_softmax(-1), wanted.float().log_softmax(-1)
    p, q = logp.exp(), logq.exp()
    hit = torch.arange(logits.shape[1], device=logits.device) == target[:, None]
    grad = (p - hit.float()) * alpha[:, None] + (p - q) * beta[:, None]
    return -(logp * hit).sum(-1), (q * (logq - logp)).sum(-1), grad.to(logits.dtype)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        steps: Any,
        head: torch.Tensor,
        target: torch.Tensor,
        alpha: torch.Tensor,
        teacher: torch.Tensor,
        beta: torch.Tensor,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        plain, distil = steps
        grad = torch.empty_like(hidden)
        nll = hidden.new_zeros(len(hidden), dtype=torch.float32)
        kl = torch.zeros_like(nll)
        taught = len(teacher)
        for start in [*range(0, taught, chunk), *range(taught, len(hidden), chunk)]:
            end = min(start + chunk, taught if start < taught else len(hidden))
            part = slice(start, end)
            logits = hidden[part] @ head.T
            if start < taught:
                wanted = teacher[part] @ head.T
                nll[part], kl[part], delta = distil(logits, wanted, target[part], alpha[part], beta[part])
            else:
                nll[part], delta = plain(logits, target[part], alpha[part])
            grad[part] = delta @ head
        ctx.save_for_backward(grad)
        return (alpha * nll).sum() + (beta * kl[: len(beta)]).sum(), nll, kl

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (grad,) = ctx.saved_tensors
        return grad * outer.to(grad.dtype), None, None, None, None, None, None, None


class HeadLoss:
    """The loss above, for one head.

    Args:
        head: [V, H], not trained.
        compiled: fuse with torch.compile.
        chunk: rows at a time; compiled code is made for each number of rows that occurs.
    """

    def __init__(self, head: torch.Tensor, compiled: bool = False, chunk: int = 255) -> None:
        self.head, self.chunk = head, chunk
        self.steps = tuple(torch.compile(f, dynamic=False) if compiled else f for f in (plain_step, distil_step))

    def __call__(
        self, hidden: torch.Tensor, target: torch.Tensor, alpha: torch.Tensor, teacher: torch.Tensor, beta: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss, cross-entropy [N], divergence [N] (0 where there is no teacher).

        Args:
            hidden: [N, H] after the last norm.
            target: int64 [N].
            alpha: float32 [N].
            teacher: [M, H], hidden states of the teacher for the first M <= N tokens, under the same head.
            beta: float32 [M].
        """
        return _HeadLoss.apply(hidden, self.steps, self.head, target, alpha, teacher, beta, self.chunk)
