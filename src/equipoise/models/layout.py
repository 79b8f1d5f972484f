"""How a module holds the weights of its routed experts, and how one expert is computed from them.

Two layouts exist: fused parameters behind transformers' experts interface (`FusedLayout`: 60-odd families) and
a dictionary of expert modules (`SwitchLayout`: Switch Transformers). Both are described by the same list of
`Weight`, so quantizing, counting bytes and saving know no family.

Legend: E experts, H hidden, I intermediate, T rows (tokens), k experts a token selects.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from equipoise.formats import plain_linear

Get = Callable[[str], torch.Tensor]
"""Name of a weight -> the tensor of the expert at hand."""

Linear = Callable[[str, torch.Tensor], torch.Tensor]
"""Name of a weight and its input [rows, in] -> [rows, out], bias included."""


@dataclass(frozen=True)
class Weight:
    """One weight of an expert.

    Attributes:
        name: as the module calls it; stored tensors are `<name>_<precision><suffix>`.
        shape: of one expert's tensor.
        out_axis: -2 for [out, in], -1 for [in, out].
        dtype: as in the checkpoint.
        quantizable: False for biases, which every slot keeps as they are.
        matrices: rows of the out axis of each matrix that the weight fuses (gate and up are two).
        bias: name of its bias, which is a weight of its own; None without.
    """

    name: str
    shape: tuple[int, ...]
    out_axis: int
    dtype: torch.dtype
    quantizable: bool
    matrices: tuple[slice, ...] = (slice(None),)
    bias: str | None = None


@dataclass(frozen=True)
class Elementwise:
    """An expert that is a product, a function of single numbers, and a product, without biases.

    Attributes:
        up: name of the first weight.
        down: name of the second.
        act: the function.
        gated: the first product is two halves, of which the second is multiplied with the function of the first.
    """

    up: str
    down: str
    act: Callable[[torch.Tensor], torch.Tensor]
    gated: bool


class ExpertsLayout(ABC):
    """Layout of one experts module."""

    elementwise: Elementwise | None = None
    """What `compute` does in these terms; None where it is something else."""

    def __init__(self, module: Any, num_experts: int, weights: tuple[Weight, ...]) -> None:
        self.module: Any = module
        self.num_experts = num_experts
        self.weights = weights

    @property
    def dtype(self) -> torch.dtype:
        """Original dtype of the expert weights."""
        return self.weights[0].dtype

    @abstractmethod
    def expert(self, name: str, e: int) -> torch.Tensor:
        """Weight `name` of expert e of the untouched module."""

    @abstractmethod
    def drop(self) -> None:
        """Remove the untouched expert weights from the module."""

    def is_expert_weight(self, name: str) -> bool:
        """Whether a parameter of the module, balanced or not, belongs to its experts (a norm after them does not)."""
        return any(weight.name in name for weight in self.weights)

    def weight(self, name: str) -> Weight:
        """The weight called `name`."""
        return next(weight for weight in self.weights if weight.name == name)

    def linear(self, get: Get) -> Linear:
        """The products of one expert whose tensors `get` gives by name, in plain operations."""

        def product(name: str, x: torch.Tensor) -> torch.Tensor:
            weight = self.weight(name)
            y = plain_linear(x, get(name), weight.out_axis)
            return y if weight.bias is None else y + get(weight.bias)

        return product

    @abstractmethod
    def compute(self, x: torch.Tensor, linear: Linear) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Experts on their rows.

        Args:
            x: [rows, H].
            linear: gives the products with a weight; which expert's, for which row, is its own matter.

        Returns:
            y [rows, H] before the routing weight, and the input of each quantizable weight by name.
        """


_INTERLEAVED = (slice(0, None, 2), slice(1, None, 2))


class FusedLayout(ExpertsLayout):
    """Fused parameters [E, out, in] behind `use_experts_implementation`: `gate_up_proj` or `up_proj`, and `down_proj`.

    The decorator describes the rest: `is_transposed`, `has_bias`, `has_gate`, `_apply_gate`, `has_post_expert_norm`.
    """

    def __init__(self, module: Any) -> None:
        self.up = "gate_up_proj" if module.has_gate else "up_proj"
        self.down = "down_proj"
        names = [self.up, self.down]
        if module.has_bias:
            names += [f"{self.up}_bias", f"{self.down}_bias"]
        weights = []
        for name in names:
            parameter = module.get_parameter(name)
            quantizable = not name.endswith("_bias")
            out_axis = -1 if module.is_transposed or not quantizable else -2
            shape = tuple(parameter.shape[1:])
            matrices: tuple[slice, ...] = (slice(None),)
            if name == "gate_up_proj":
                half = shape[out_axis] // 2
                matrices = (slice(0, half), slice(half, None)) if module.is_concatenated else _INTERLEAVED
            bias = f"{name}_bias" if quantizable and module.has_bias else None
            weights.append(Weight(name, shape, out_axis, parameter.dtype, quantizable, matrices, bias))
        super().__init__(module, module.get_parameter(self.up).shape[0], tuple(weights))
        # A family with a gate of its own defines the method itself.
        plain_gate = not module.has_gate or type(module)._apply_gate.__module__ == "transformers.integrations.moe"
        if plain_gate and not module.has_bias and not module.has_post_expert_norm and _is_fixed(module.act_fn):
            self.elementwise = Elementwise(self.up, self.down, module.act_fn, module.has_gate)

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """True for a module behind transformers' experts interface that still has its own weights."""
        described = all(hasattr(module, a) for a in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))
        return described and isinstance(getattr(module, "down_proj", None), nn.Parameter)

    def expert(self, name: str, e: int) -> torch.Tensor:
        """Slice e of the fused parameter."""
        return self.module.get_parameter(name)[e]

    def drop(self) -> None:
        """Delete the fused parameters."""
        for weight in self.weights:
            delattr(self.module, weight.name)

    def compute(self, x: torch.Tensor, linear: Linear) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Up, gate, down, and the norm after the expert where the family has one."""
        module = self.module
        hidden = linear(self.up, x)
        inner = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        y = linear(self.down, inner)
        if module.has_post_expert_norm:
            y = module.post_expert_norm(y)
        return y, {self.up: x, self.down: inner}


class SwitchLayout(ExpertsLayout):
    """Switch Transformers: a ModuleDict of experts `expert_<e>`, each `wi` [I, H] and `wo` [H, I], no bias."""

    def __init__(self, module: Any) -> None:
        first = module["expert_0"]
        weights = tuple(
            Weight(name, tuple(getattr(first, name).weight.shape), -2, getattr(first, name).weight.dtype, True)
            for name in ("wi", "wo")
        )
        self.act = first.act
        super().__init__(module, len(module), weights)
        if _is_fixed(self.act):
            self.elementwise = Elementwise("wi", "wo", self.act, False)

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """True for Switch's experts that still have their own weights."""
        return type(module).__name__ == "SwitchTransformersExperts" and "expert_0" in dict(module.named_children())

    def expert(self, name: str, e: int) -> torch.Tensor:
        """Weight of the module `expert_<e>`."""
        return self.module.get_parameter(f"expert_{e}.{name}.weight")

    def drop(self) -> None:
        """Delete the expert modules."""
        for e in range(self.num_experts):
            del self.module[f"expert_{e}"]

    def compute(self, x: torch.Tensor, linear: Linear) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """wi, activation, wo."""
        # Dropout is left out: a balanced model is for inference.
        inner = self.act(linear("wi", x))
        return linear("wo", inner), {"wi": x, "wo": inner}


def _is_fixed(act: Any) -> bool:
    """Whether an activation has no parameters, so that it is the same function tomorrow."""
    return not isinstance(act, nn.Module) or not any(True for _ in act.parameters())


LAYOUTS: tuple[type[FusedLayout] | type[SwitchLayout], ...] = (FusedLayout, SwitchLayout)
