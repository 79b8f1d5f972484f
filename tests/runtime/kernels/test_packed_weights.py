"""Packed weights read as the plain tensors they stand for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from equipoise.runtime.kernels.packed import PackedWeight, can_pack

pytestmark = pytest.mark.skipif(
    not (can_pack(torch.int8) and can_pack(torch.bfloat16)), reason="no matrix instructions on this processor"
)
SHAPES = [(3, 16, 16), (2, 33, 5), (1, 1, 7), (4, 64, 48)]


def plain(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-127, 128, shape).to(dtype)


@pytest.mark.parametrize("out_axis", [-2, -1])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_round_trip_is_exact(shape: tuple[int, ...], dtype: torch.dtype, out_axis: int):
    weight = plain(shape, dtype)
    packed = PackedWeight.pack(weight, out_axis)
    assert (packed.shape, packed.dtype, packed.nbytes) == (weight.shape, weight.dtype, weight.nbytes)
    assert torch.equal(packed.unpack(), weight)
    assert torch.equal(packed.slot(0), weight[0])
    assert torch.equal(packed + 0, weight)  # any operation sees the plain tensor
    assert torch.equal(packed[0], weight[0])


def test_as_a_parameter():
    weight = plain((2, 16, 32), torch.int8)
    module = nn.Module()
    module.w = nn.Parameter(PackedWeight.pack(weight, -2), requires_grad=False)
    assert isinstance(module.w, PackedWeight)
    assert [name for name, _ in module.named_parameters()] == ["w"]
    twin = copy.deepcopy(module)
    twin.w.replace(1, plain((16, 32), torch.int8))
    assert torch.equal(module.w.unpack(), weight)
    assert not torch.equal(twin.w.unpack(), weight)
    assert module.to("cpu").w is module.w


def test_a_whole_copy_packs_anew():
    packed = PackedWeight.pack(plain((2, 16, 32), torch.bfloat16), -2)
    other = plain((2, 16, 32), torch.bfloat16)
    packed.copy_(other)
    assert torch.equal(packed.unpack(), other)


@pytest.mark.parametrize("change", [lambda w: w.zero_(), lambda w: w.add_(1), lambda w: w.__setitem__(0, 0)])
def test_writing_in_place_is_refused(change):
    weight = plain((2, 16, 32), torch.int8)
    packed = PackedWeight.pack(weight, -2)
    if change is not None:
        with pytest.raises(RuntimeError, match=r"PackedWeight\.replace"):
            change(packed)
    assert torch.equal(packed.unpack(), weight)
