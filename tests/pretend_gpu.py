"""A pretend CUDA device for machines without one: values as on the CPU, and the errors of two devices.

    model = to_gpu(model)
    with pretend_gpu():
        model(ids.to(model.device))

A tensor of it says that it is on `cuda:0` and holds a CPU tensor, on which every operation runs. What a real device
refuses is refused: operands on both devices, `.numpy()`, a CPU generator. What only a real device has (its kernels,
inference mode, memory, speed) is not seen. Attention has to be `eager`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only
from transformers import PreTrainedModel

ATEN: Any = torch.ops.aten
CUDA = torch.device("cuda", 0)
COPIES = (ATEN.copy_.default, ATEN._to_copy.default)
INDEXING = (ATEN.index.Tensor, ATEN.index_put_.default, ATEN._index_put_impl_.default)
"""A GPU's tensor may be indexed by one of the host."""


class OnGpu(torch.Tensor):
    """A tensor that says it is on the device; for torch itself it is a meta tensor."""

    held: torch.Tensor
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGpu:
        one: OnGpu = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device="meta",
        )  # fmt: skip
        one.held = held
        return one

    def __repr__(self) -> str:
        return f"OnGpu({tuple(self.shape)})"

    def tolist(self) -> Any:
        """A copy on the host, as of any device."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    gpu: list[OnGpu] = []
    host: list[torch.Tensor] = []
    tree_map_only(torch.Tensor, lambda t: (gpu if isinstance(t, OnGpu) else host).append(t), (args, kwargs))
    indexed = func in INDEXING and isinstance(args[0], OnGpu)
    if gpu and any(t.ndim for t in host) and func not in COPIES and not indexed:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    if gpu and any(isinstance(a, torch.Generator) for a in (*args, *kwargs.values())):
        raise RuntimeError(f"{func}: expected a 'cuda' device type for generator")
    there = bool(gpu)
    if func is ATEN.copy_.default:
        there = isinstance(args[0], OnGpu)
    plain, named = tree_map(lambda a: a.held if isinstance(a, OnGpu) else a, (args, kwargs))
    if named.get("device") is not None:
        there = named["device"].type == "meta"
        named["device"] = torch.device("cpu")
    if func is ATEN.histc.default:  # of integers: on a GPU only
        plain = (plain[0].float(), *plain[1:])
    known = {id(t.held): t for t in gpu}

    def outside(t: torch.Tensor) -> torch.Tensor:
        if id(t) in known:
            return known[id(t)]
        return OnGpu(t) if there else t

    return tree_map_only(torch.Tensor, outside, func(*plain, **named))


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Devices(TorchFunctionMode):
    """`device="cuda"` becomes the meta device, which `_run` takes for the GPU."""

    def __torch_function__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        def cuda(a: Any) -> bool:
            return (isinstance(a, torch.device) and a.type == "cuda") or (isinstance(a, str) and a == "cuda")

        named = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and cuda(named.get("device")):
            del named["device"]
            return OnGpu(func(*args, **named))
        meta = torch.device("meta")
        named = {name: meta if name == "device" and cuda(a) else a for name, a in named.items()}
        return func(*(meta if cuda(a) else a for a in args), **named)


def _enter(mode: Any) -> None:
    """Inference mode as no_grad: its tensors cannot be wrapped."""
    mode.kept = torch.is_grad_enabled()
    torch._C._set_grad_enabled(mode.kept and not mode.mode)


@contextlib.contextmanager
def pretend_gpu() -> Iterator[None]:
    """Tensors may be on the device inside the block."""
    with pytest.MonkeyPatch.context() as patch, _Devices(), _Operations():
        patch.setattr(torch.inference_mode, "__enter__", _enter)
        patch.setattr(torch.inference_mode, "__exit__", lambda mode, *_: torch._C._set_grad_enabled(mode.kept))
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        yield


def to_gpu(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its parameters and buffers on the device."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(OnGpu(weight.data), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnGpu(buffer)
    return model
