"""The Triton kernels compile for compute capability 9.0, as they are launched for large experts; needs no GPU."""

from __future__ import annotations

from typing import Any

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1 compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from equipoise.runtime.kernels import triton_grouped  # noqa: E402

pytestmark = pytest.mark.gpu

SHARED = 101_376
"""Bytes of shared memory a block may have on the smallest cards of compute capability 8.0 and more."""
FORMS = {
    "int8": ("*i8", "*i8", True),
    "int8_weight_only": ("*bf16", "*i8", True),
    "original": ("*bf16", "*bf16", False),
}


def compiled(precision: str, mean: int, out_axis: int) -> Any:
    rows, weights, scaled = FORMS[precision]
    int8 = precision == "int8"
    block = triton_grouped.sizes(8 * mean, 8, 2048, int8)
    options = {key: block.pop(key) for key in ("num_warps", "num_stages")}
    fixed = {"S": 64, "INT8": int8, "SCALED": scaled, "GATHER": True, "EVEN_N": True, "EVEN_K": True, **block}
    fixed["stride_k" if out_axis == -2 else "stride_n"] = 1
    kernel = triton_grouped._linear
    kinds = {"x": rows, "weight": weights, "out": "*bf16", "tokens": "*i32", "ends": "*i32"}
    kinds |= {"x_scale": "*fp32", "w_scale": "*fp32"}
    signature = {name: "constexpr" if name in fixed else kinds.get(name, "i32") for name in kernel.arg_names}
    # What a launch finds out by itself: addresses and sizes are multiples of 16.
    sixteen = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in fixed and name not in ("first", "slots")
    }
    source = ASTSource(kernel, signature, constexprs=fixed, attrs=sixteen)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("precision", list(FORMS))
@pytest.mark.parametrize(("mean", "out_axis"), [(1, -2), (50, -2), (200, -2), (1, -1)])
def test_products_use_matrix_units_and_load_ahead(precision: str, mean: int, out_axis: int):
    found = compiled(precision, mean, out_axis)
    assert ("wgmma" if mean > 24 else "mma.sync") in found.asm["ptx"]
    assert "cp.async" in found.asm["ptx"]
    assert found.metadata.shared <= SHARED
