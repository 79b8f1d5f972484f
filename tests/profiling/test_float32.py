"""A model that computes in float32 while its weights stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from equipoise.profiling.float32 import in_float32
from profiling.test_importance_core import inputs_of
from profiling.test_sensitivity import state
from tiny import FAMILIES


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_every_family_computes_what_its_wide_copy_does(family: str, dtype: torch.dtype):
    model = FAMILIES[family](dtype=dtype)
    inputs = inputs_of(model, 0)
    before, kinds = state(model), {name: t.dtype for name, t in tensors(model).items()}
    with in_float32(model):
        found = model(**inputs).logits
    wide = FAMILIES[family](dtype=dtype).float()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wide(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert state(model) == before
    assert {name: t.dtype for name, t in tensors(model).items()} == kinds
    for name, parameter in FAMILIES[family](dtype=dtype).named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)


@torch.no_grad()
def test_an_error_in_a_block_leaves_it_as_it_was():
    model = FAMILIES["mixtral"](dtype=torch.bfloat16)

    def fail(*_: Any) -> None:
        raise RuntimeError("a fault")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a fault"), in_float32(model):
        model(**inputs_of(model, 0))
    handle.remove()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
