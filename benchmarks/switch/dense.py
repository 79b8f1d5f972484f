"""All experts of a layer in two products, for training on an accelerator.

transformers calls one expert after the other and asks the device which of them have tokens. In a model this small a
step is then a queue of tiny kernels with a wait for the device in each sparse layer. Here every token goes through
every expert and a mask leaves the one that was chosen:

    y_t = sum_e  m_te  W2_e  act(W1_e x_t)         m_te = gate of t if t goes to e, else 0

E times the arithmetic of the experts, the same function and gradients up to rounding. An expert without tokens gets a
gradient of 0 where the loop leaves none. Parameters keep their names, so checkpoints and artifacts are the same.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch.nn import functional


def all_at_once(model: Any) -> int:
    """Make every sparse layer of a model compute its experts together, in place. Returns the number of layers."""
    layers = [module for module in model.modules() if type(module).__name__ == "SwitchTransformersExperts"]
    for experts in layers:
        experts.forward = MethodType(_forward, experts)
    return len(layers)


def _forward(
    self: Any, hidden_states: torch.Tensor, selected_experts: torch.Tensor, routing_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers' experts return, [T, D].

    Of hidden states [T, D], the choice as one-hot int64 [T, 1, E] (all 0 for a token beyond an expert's capacity) and
    gates [T, 1].
    """
    experts = list(self.values())
    first = torch.cat([expert.wi.weight for expert in experts])  # [E F, D]
    second = torch.cat([expert.wo.weight for expert in experts], 1)  # [D, E F]
    inner = experts[0].act(functional.linear(hidden_states, first))
    inner = functional.dropout(inner, experts[0].dropout.p, self.training)
    gates = selected_experts[:, 0] * routing_weights  # [T, E]
    inner = inner.view(len(hidden_states), len(experts), -1) * gates[:, :, None].to(inner.dtype)
    return functional.linear(inner.flatten(1), second)
