"""What transformers must know: the experts implementation and the checkpoint format, both named `equipoise`.

Imported as soon as both `equipoise` and `transformers.modeling_utils` are. A balanced checkpoint carries its plan
in `config.json` under `quantization_config`; on load the skeleton gets the plan's empty slots before the weights
are read into them.
"""

from __future__ import annotations

from typing import Any

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from equipoise.errors import InputError
from equipoise.runtime.experts import IMPLEMENTATION, experts_forward

for _mapping in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
    _mapping.pop(IMPLEMENTATION, None)  # a reload of this module must not fail


@register_quantization_config(IMPLEMENTATION)
class EquipoiseConfig(QuantizationConfigMixin):
    """`quantization_config` of a balanced checkpoint: the plan, whole."""

    def __init__(self, plan: dict[str, Any] | None = None, **keywords: Any) -> None:
        if plan is None:
            raise InputError(
                "quantization_config of a balanced checkpoint has no plan; write it with `equipoise apply`"
            )
        self.quant_method = IMPLEMENTATION  # type: ignore[assignment]
        self.plan = plan


@register_quantizer(IMPLEMENTATION)
class EquipoiseQuantizer(HfQuantizer):
    """Gives the skeleton the plan's slots before transformers reads the weights."""

    requires_calibration = True
    from_file = False
    """Whether the model came from a checkpoint, not from `apply` in memory."""

    def _process_model_before_weight_loading(self, model: Any, **keywords: Any) -> None:
        # Not at the top: this module may be imported in the middle of an import of transformers' model classes.
        from equipoise.files.plan_json import plan_from_json
        from equipoise.models.families import find_layers
        from equipoise.runtime.install import check_fits, dispatch, empty_layer

        self.from_file = True
        plan = plan_from_json(self.quantization_config.plan)  # type: ignore[attr-defined]
        layers = find_layers(model)
        check_fits(plan, model, layers)
        for layer, layer_plan in zip(layers, plan.layers, strict=True):
            if not layer_plan.is_identity:
                empty_layer(layer, layer_plan)
                _spare_block(model, layer.name)
        dispatch(model)

    def _process_model_after_weight_loading(self, model: Any, **keywords: Any) -> Any:
        from equipoise.models.families import find_layers
        from equipoise.runtime.packing import leave_file, pack_layers

        if pack_layers(find_layers(model)) and self.from_file:
            leave_file(model)
        return model

    def is_serializable(self) -> bool:
        """Balanced models save as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Balanced models are for inference."""
        return False


def _spare_block(model: Any, experts: str) -> None:
    """Keep transformers from initialising the block around replaced experts.

    Some families (Switch, Qwen3-Omni) initialise the experts from their block, by names that are gone. Buffers that
    are never saved do need that initialisation, so a block with such buffers is left to it.
    """
    block = model.get_submodule(experts.rpartition(".")[0])
    if not block._non_persistent_buffers_set:
        block._is_hf_initialized = True


if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
    ExpertsInterface.register(IMPLEMENTATION, experts_forward)
