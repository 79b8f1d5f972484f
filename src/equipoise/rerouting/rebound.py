"""A method that sees one function of torch exchanged, and nothing else: for what is called too often to be watched.

A `TorchFunctionMode` sees every call in its block, whoever makes it, and takes several microseconds for each; in a
model, whose weights have swept the caches since, several times that. Python looks a global name up in the dictionary
of the function that uses it. So a copy of the method, with a dictionary in which `torch` is a view of torch, calls what
the view has under that one name. The original and its module stay as they are.

It reaches what the method calls as `torch.name(...)` itself: no methods of tensors, no helper functions. Who needs one
of those has to notice that nothing came.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch


class _View:
    """torch, but for one function."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def rebound(method: Callable[..., Any], name: str, function: Callable[..., Any]) -> Callable[..., Any] | None:
    """A copy of `method` for which `torch.<name>` is `function`.

    Returns:
        The bound copy, or None where `method` is no plain method that uses `torch` and that name.
    """
    own = getattr(method, "__func__", None)
    if not isinstance(method, MethodType) or not isinstance(own, FunctionType) or hasattr(own, "__wrapped__"):
        return None
    if own.__globals__.get("torch") is not torch or not {"torch", name} <= set(own.__code__.co_names):
        return None
    # A code object of its own: what Python remembers in it of where globals lie holds for one dictionary only.
    names = {**own.__globals__, "torch": _View(name, function)}
    copy = FunctionType(own.__code__.replace(), names, own.__name__, own.__defaults__, own.__closure__)
    copy.__kwdefaults__ = own.__kwdefaults__
    return MethodType(copy, method.__self__)
