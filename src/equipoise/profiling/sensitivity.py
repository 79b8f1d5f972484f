"""How much the model's predictions feel a change of a layer's routed output: one backward pass over calibration text.

    s[t] = |g[t]|^2 / H        g[t]: gradient of the summed log-probability of the next tokens by the layer's output

with the next tokens drawn from the model itself. E[g g^T] is then the Hessian of the divergence between the predictions
before and after a change of the output (the Fisher information), and a change d[t] of no particular direction costs
1/2 |d[t]|^2 s[t] nats at token t. Weighted so, errors of different tokens and layers add up in one unit.

Only what comes after the first MoE layer takes part in the backward pass, and no weight gets a gradient. A layer is
looked at while the backward pass is in it, so that no gradient is kept beside those of autograd. Experts run one by one
(transformers' `eager`), whose products have gradients in every dtype. Draws are seeded by the text, so the order of the
batches does not matter.

B sequences, Q their length, V vocabulary, H hidden size.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from equipoise.errors import InputError
from equipoise.models.families import MoELayer, Routing

Weighed = Callable[[int, MoELayer, Routing, "torch.Tensor | None", torch.Tensor], None]
"""Called for each layer with (row, layer, routing, real rows or None for all, s float32 [rows])."""

ROWS = 512
"""Rows of logits that are turned into probabilities at a time."""
TOKENS = 4096
"""Tokens of a forward and backward pass; a batch of more is cut by sequences."""
_WITHOUT = "measure importance without gradients (--no-sensitivity; ProfileOptions(sensitivity=False))"


class Backward:
    """Forward and backward passes of a model, each layer weighed by its gradient.

    Args:
        model: in evaluation mode.
        weigh: called in the backward pass.

    Raises:
        InputError: weights are offloaded, so that autograd would have to hold all of them.
    """

    def __init__(self, model: PreTrainedModel, weigh: Weighed) -> None:
        places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
        if places & {"disk", "meta"} or ("cpu" in places and len(places) > 1):
            raise InputError(f"weights are offloaded, and a backward pass would hold all of them: {_WITHOUT}")
        self.model, self.weigh = model, weigh
        self.tokens = 0
        self._pending: dict[int, tuple[MoELayer, Routing, torch.Tensor | None]] = {}

    def observe(self, row: int, layer: MoELayer, routing: Routing, real: torch.Tensor | None) -> None:
        """What `watch` tells before the experts of a layer run."""
        detached = Routing(routing.hidden.detach(), routing.index, routing.weights.detach())
        self._pending[row] = (layer, detached, real)

    def run(self, inputs: dict[str, torch.Tensor]) -> None:
        """One batch; adds to `tokens` the tokens whose successor was drawn.

        Args:
            inputs: what the model is called with; tensors [B, Q].

        Raises:
            InputError: the model cannot be run backwards, or its gradient is not finite.
        """
        size = max(1, TOKENS // inputs["input_ids"].shape[1])
        for first in range(0, len(inputs["input_ids"]), size):
            self._pass({k: v[first : first + size] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})

    def _pass(self, inputs: dict[str, Any]) -> None:
        # A caller's inference mode would make tensors that autograd refuses.
        with torch.inference_mode(False), torch.enable_grad(), differentiable(self.model):
            plain = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            logits = self.model(**plain).logits
            mask = plain.get("decoder_attention_mask") if "decoder_input_ids" in plain else plain["attention_mask"]
            real = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device) if mask is None else mask.bool()
            if not logits.requires_grad:
                raise InputError(f"no gradient reaches the layers of {type(self.model).__name__}: {_WITHOUT}")
            self.tokens += int(real.sum())
            real = real.to(logits.device)
            text = plain.get("decoder_input_ids", plain["input_ids"]).to(logits.device)[real]
            slope = _slope(logits.detach(), real, zlib.crc32(text.cpu().numpy().tobytes()))
            try:
                logits.backward(slope)
            except (NotImplementedError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                reason = str(error).strip().splitlines()[0]
                raise InputError(f"the model cannot be run backwards ({reason}): {_WITHOUT}") from error
            finally:
                self._pending.clear()

    @contextmanager
    def attached(self, layers: list[MoELayer]) -> Iterator[None]:
        """Look at the output of each layer's experts inside the block."""

        def hook_of(row: int) -> Callable[..., Any]:
            def hook(module: Any, inputs: Any, output: Any) -> Any:
                if not torch.is_grad_enabled() or row not in self._pending:
                    return output
                out = output[0] if isinstance(output, tuple) else output
                if not out.requires_grad:
                    # The first layer: the backward pass ends here. A copy, as a leaf must not be written into.
                    out = out.detach().requires_grad_().clone()
                layer, routing, real = self._pending.pop(row)
                out.register_hook(lambda grad: self._weigh(row, layer, routing, real, grad))
                return (out, *output[1:]) if isinstance(output, tuple) else out

            return hook

        with ExitStack() as hooks:
            for row, layer in enumerate(layers):
                hooks.callback(layer.experts.register_forward_hook(hook_of(row)).remove)
            yield

    @torch.no_grad()
    def _weigh(
        self, row: int, layer: MoELayer, routing: Routing, real: torch.Tensor | None, grad: torch.Tensor
    ) -> None:
        squares = grad.reshape(len(routing.index), -1).float().square().mean(-1)
        if real is not None:
            squares = squares.masked_fill(~real, 0.0)
        if not bool(squares.isfinite().all()):
            raise InputError(f"the gradient at layer {layer.name} is NaN or inf: {_WITHOUT}")
        self.weigh(row, layer, routing, real, squares)


@torch.no_grad()
def _slope(logits: torch.Tensor, real: torch.Tensor, seed: int) -> torch.Tensor:
    """Gradient of sum log p(drawn) by the logits [B, Q, V]: one at the drawn token, less the probabilities."""
    # Drawn on the host by the inverse of the distribution: the same tokens on every device, but for rounding.
    drawn = torch.Generator().manual_seed(seed)
    flat = logits.reshape(-1, logits.shape[-1])
    slope = torch.zeros_like(flat)
    for rows in real.reshape(-1).nonzero()[:, 0].split(ROWS):
        p = flat[rows].float().softmax(-1)
        if not bool(p.isfinite().all()):
            raise InputError("the model's logits are NaN or inf on the calibration text; the checkpoint is damaged")
        below = p.cumsum(-1)
        level = torch.rand(len(rows), 1, generator=drawn).to(p.device) * below[:, -1:]
        chosen = torch.searchsorted(below, level, right=True).clamp_(max=p.shape[-1] - 1)
        slope[rows] = p.neg_().scatter_add_(1, chosen, torch.ones_like(p[:, :1])).to(slope.dtype)
    return slope.view_as(logits)


@contextmanager
def differentiable(model: PreTrainedModel) -> Iterator[None]:
    """No parameter asks for a gradient inside the block, and experts run one by one."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        with one_by_one(model):
            yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def one_by_one(model: PreTrainedModel) -> Iterator[None]:
    """Experts run one after the other inside the block (transformers' `eager`)."""
    before: str | None = getattr(model.config, "_experts_implementation", None)
    switched = before not in (None, "eager") and model._can_set_experts_implementation()
    try:
        if switched:
            model.set_experts_implementation("eager")
        yield
    finally:
        if switched and before is not None:
            model.set_experts_implementation(before)
