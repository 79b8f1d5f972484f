"""Weights of slots in oneDNN's blocked layout, held once.

A `PackedWeight` is a tensor subclass that reads as the plain tensor [n, out, in] (or [n, in, out]) it stands for:
shape, dtype, bytes, `state_dict` and conversions are those of the plain weight, equal bit for bit; what is in memory
is one opaque tensor a slot, which the kernels read. Anything but a kernel unpacks, so it is right everywhere and
costs a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

_ATEN: Any = torch.ops.aten
_ONEDNN: Any = torch.ops.onednn
_MKLDNN: Any = torch.ops.mkldnn


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this processor has the matrix instructions for prepacked weights of `dtype`."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.int8:
        return bool(torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported())
    return dtype == torch.bfloat16 and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def instructions() -> str:
    """What the kernels run on here, for a log line."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512-VNNI" if torch.cpu._is_vnni_supported() else "no matrix instructions"


def _pack(weight: torch.Tensor, out_axis: int) -> torch.Tensor:
    """One slot's weight, packed; [out, in] or [in, out] by `out_axis`."""
    matrix = weight.detach() if out_axis == -2 else weight.detach().t()
    if matrix.dtype == torch.int8:
        return _ONEDNN.qlinear_prepack(matrix.contiguous(), None)  # type: ignore[no-any-return]
    return _MKLDNN._reorder_linear_weight(matrix.contiguous())  # type: ignore[no-any-return]


def _unpack(packed: torch.Tensor, out_axis: int) -> torch.Tensor:
    """The plain weight of one slot."""
    plain = packed.to_dense()
    # oneDNN holds int8 weights as [in, out], bf16 ones as [out, in].
    turned = (packed.dtype == torch.int8) == (out_axis == -2)
    return plain.t() if turned else plain


class PackedWeight(torch.Tensor):
    """One weight of the slots of a precision, packed; see the module.

    Attributes:
        packs: one opaque tensor a slot, in the order of the pool. Replacing an entry (`replace`) is one reference: a
            product under way keeps the one it has.
        out_axis: of the plain weight.
    """

    packs: list[torch.Tensor]
    out_axis: int

    @staticmethod
    def __new__(cls, packs: Sequence[torch.Tensor], shape: Sequence[int], dtype: torch.dtype, out_axis: int) -> Any:
        """A view of `packs` as a plain tensor of `shape`."""
        return torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype)  # type: ignore[attr-defined]

    def __init__(self, packs: Sequence[torch.Tensor], shape: Sequence[int], dtype: torch.dtype, out_axis: int) -> None:
        self.packs = list(packs)
        self.out_axis = out_axis

    @classmethod
    def pack(cls, plain: torch.Tensor, out_axis: int) -> PackedWeight:
        """Pack [n, ...] slot by slot."""
        packs = [_pack(weight, out_axis) for weight in plain]
        return cls(packs, plain.shape, plain.dtype, out_axis)

    def slot(self, place: int) -> torch.Tensor:
        """The plain weight of one slot, a copy."""
        return _unpack(self.packs[place], self.out_axis)

    def replace(self, place: int, plain: torch.Tensor) -> None:
        """Give one slot another weight."""
        self.packs[place] = _pack(plain.to(self.dtype), self.out_axis)

    def unpack(self) -> torch.Tensor:
        """The plain tensor, a copy."""
        plain = torch.empty(self.shape, dtype=self.dtype)
        for place in range(len(self.packs)):
            plain[place] = self.slot(place)
        return plain

    def _twin(self) -> PackedWeight:
        return PackedWeight(self.packs, self.shape, self.dtype, self.out_axis)

    def __setitem__(self, where: Any, value: Any) -> None:
        """Refused: an item is a copy, so the write would be lost."""
        raise RuntimeError("writing into packed weights is not possible in place; use PackedWeight.replace")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Packs are never written in place, so a copy may share them."""
        twin = memo[id(self)] = nn.Parameter(self._twin(), requires_grad=False)
        return twin

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape and dtype, without unpacking."""
        return f"PackedWeight(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Unpack for any operation but those that make another reference."""
        first: Any = args[0] if args else None
        if func is _ATEN.detach.default:
            return first._twin()
        if func is _ATEN.copy_.default and isinstance(first, PackedWeight):
            source = args[1].unpack() if isinstance(args[1], PackedWeight) else args[1]
            for place in range(len(first.packs)):
                first.replace(place, source.expand(first.shape)[place])
            return first
        if func._schema.is_mutable and any(isinstance(a, PackedWeight) for a in args):
            raise RuntimeError(f"{func} would write into packed weights; use PackedWeight.replace")

        def plain(value: Any) -> Any:
            return value.unpack() if isinstance(value, PackedWeight) else value

        return func(*torch.utils._pytree.tree_map(plain, args), **torch.utils._pytree.tree_map(plain, kwargs or {}))
