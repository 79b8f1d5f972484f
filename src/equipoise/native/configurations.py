"""Configurations of the native families: the fields of their published config.json, with the authors' defaults.

No torch here: a configuration imports its model class only when one is built. Annotations are not postponed: the
types of the fields are checked by them.
"""

import importlib
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig


class NativeConfig(LlamaConfig):
    """A Llama configuration that brings its model class with it.

    The Auto classes of models cannot be told earlier: transformers imports them in the middle of its own Llama,
    which the model classes need whole.
    """

    model_module: ClassVar[str]
    """Module that registers the model class when it is imported."""

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the fields, then import the model class."""
        super().__post_init__(**kwargs)
        importlib.import_module(self.model_module)


@strict
class DeepseekConfig(NativeConfig):
    """DeepSeek-MoE (arXiv 2401.06066), as `deepseek-ai/deepseek-moe-16b-base` and `-chat`.

    Attributes:
        moe_intermediate_size: width of a routed expert.
        n_shared_experts: experts that every token meets, stored as one of their joint width; None for none.
        n_routed_experts: E; None for a dense model.
        num_experts_per_tok: k.
        moe_layer_freq: layers whose number it divides are MoE layers ...
        first_k_dense_replace: ... from this number on.
        norm_topk_prob: whether the weights of a token's experts are made to add up to 1.
        scoring_func: only `softmax` is published.
    """

    model_type = "deepseek"
    model_module = "equipoise.native.deepseek"
    attribute_map: ClassVar[dict[str, str]] = {"num_experts": "n_routed_experts"}

    vocab_size: int = 102400
    num_hidden_layers: int = 30
    num_key_value_heads: int | None = 32
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    moe_intermediate_size: int = 1407
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True

    def validate_architecture(self) -> None:
        """Refuse what the authors' code refuses too.

        Raises:
            ValueError: another scoring function.
        """
        super().validate_architecture()
        if self.scoring_func != "softmax":
            raise ValueError(f"scoring_func {self.scoring_func!r} is unknown; deepseek scores experts by softmax")

    def is_moe_layer(self, layer: int) -> bool:
        """Whether a decoder layer has experts."""
        first, every = self.first_k_dense_replace, self.moe_layer_freq
        return self.n_routed_experts is not None and layer >= first and layer % every == 0


@strict
class LlamaMoEConfig(NativeConfig):
    """LLaMA-MoE (arXiv 2406.16554), as `llama-moe/LLaMA-MoE-v1-3_5B-2_8`, `-3_0B-2_16`, `-3_5B-4_16` and their SFT.

    Attributes:
        intermediate_size: of the Llama that was cut up: the experts of a layer share it.
        num_experts: E.
        num_selects: k.
        size_experts: widths [layers][E] of the experts; None for equal parts.
        gate_type: only `TopKBalancedNoisyGate` is published.
        gate_network: `mlp` (two matrices with tanh between) or `linear`.
        gate_use_softmax: whether the selected logits become weights that add up to 1.
        gate_add_noise: whether there is a matrix for the noise of training. It is kept and saved, not used.
        calculator_type: only `UniversalCalculator`, which drops no token, is published.
        multiply_gate_scores: False: the experts of a token are added up as they are.
        score_scale_factor: the weights are multiplied by it; one number, or one a layer.
    """

    model_type = "llama_moe"
    model_module = "equipoise.native.llama_moe"
    attribute_map: ClassVar[dict[str, str]] = {"num_experts_per_tok": "num_selects"}

    pad_token_id: int | None = 0
    num_experts: int = 16
    num_selects: int = 4
    size_experts: list[list[int]] | None = None
    gate_type: str = "TopKBalancedNoisyGate"
    gate_network: str = "mlp"
    gate_use_softmax: bool = True
    gate_use_balance: bool = True
    gate_balance_loss_weight: float = 1e-2
    gate_add_noise: bool = True
    gate_noise_epsilon: float = 1e-2
    calculator_type: str = "UniversalCalculator"
    multiply_gate_scores: bool = True
    score_scale_factor: int | float | list[float] = 1.0
    add_weight_norm: bool = False

    def validate_architecture(self) -> None:
        """Refuse what no published checkpoint has, rather than compute something else.

        Raises:
            ValueError: another gate or calculator, weight norm, or experts of different sizes.
        """
        super().validate_architecture()
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                choices = " or ".join(map(repr, known))
                raise ValueError(f"{name} {getattr(self, name)!r} of llama_moe is not supported, only {choices}")
        if self.intermediate_size % self.num_experts:
            raise ValueError(
                f"intermediate_size {self.intermediate_size} does not divide into {self.num_experts} experts"
            )
        for layer, sizes in enumerate(self.size_experts or []):
            if sizes != [self.moe_intermediate_size] * self.num_experts:
                raise ValueError(
                    f"size_experts of layer {layer} are not {self.num_experts} times {self.moe_intermediate_size}: "
                    "experts of different sizes cannot be held in one tensor"
                )

    @property
    def moe_intermediate_size(self) -> int:
        """Width of an expert."""
        return self.intermediate_size // self.num_experts


_KNOWN: dict[str, tuple[Any, ...]] = {
    "gate_type": ("TopKBalancedNoisyGate",),
    "gate_network": ("mlp", "linear"),
    "calculator_type": ("UniversalCalculator",),
    "add_weight_norm": (False,),
}

CONFIGURATIONS: tuple[type[NativeConfig], ...] = (DeepseekConfig, LlamaMoEConfig)
