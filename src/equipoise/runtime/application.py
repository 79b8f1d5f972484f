"""`apply`: a plan given to a model in memory.

Everything that can be wrong (another model, a plan that does not fit, a weight beyond its precision) is checked
before the first weight is touched.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from equipoise.errors import InputError
from equipoise.files.plan_json import check_plan, plan_to_json
from equipoise.models.families import find_layers
from equipoise.runtime.install import check_fits, check_weights, dispatch, fill_layer, plan_of
from equipoise.runtime.packing import pack_layer
from equipoise.runtime.registration import EquipoiseConfig, EquipoiseQuantizer
from equipoise.types import Plan


def apply(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Give `model` the slots of `plan`, in place, and return it.

    `model.save_pretrained` then writes a checkpoint that plain `from_pretrained` loads after `import equipoise`.

    Raises:
        InputError: the plan is not valid, or was made for another model, or the model has a plan already, or a weight
            does not fit the precision it is to get. The model is then as it was.
    """
    if plan_of(model) is not None:
        raise InputError("the model has a plan already; load the original again to apply another")
    check_plan(plan)
    layers = find_layers(model)
    check_fits(plan, model, layers)
    changed = [pair for pair in zip(layers, plan.layers, strict=True) if not pair[1].is_identity]
    for layer, layer_plan in changed:
        check_weights(layer, layer_plan)
    for layer, layer_plan in changed:
        fill_layer(layer, layer_plan)
        pack_layer(layer)
    finish(model, plan)
    return model


def finish(model: PreTrainedModel, plan: Plan) -> None:
    """Route the model's experts through the registered implementation and attach what saving needs."""
    dispatch(model)
    config = EquipoiseConfig(plan=plan_to_json(plan))
    quantizer = EquipoiseQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    quantizer.postprocess_model(model)
