"""Precisions a slot can be held in.

A format says which tensors it stores, of which shape and dtype (so bytes are known without any tensor), and turns
a weight into them and back.

To add one: write a module with a `Format` and name it here and in `equipoise.types.Precision`.
"""

from __future__ import annotations

from equipoise.formats.base import Format, Part, plain_linear
from equipoise.formats.floats import Float16, Original
from equipoise.formats.int8 import Int8, Int8WeightOnly, quantize_rows
from equipoise.types import PRECISIONS

FORMATS: dict[str, Format] = {f.name: f for f in (Original(), Int8(), Int8WeightOnly(), Float16())}

if set(FORMATS) != set(PRECISIONS):
    raise AssertionError("equipoise.formats and equipoise.types.Precision name different precisions")

__all__ = ["FORMATS", "Format", "Part", "get_format", "plain_linear", "quantize_rows"]


def get_format(name: str) -> Format:
    """The format called `name`.

    Raises:
        KeyError: unknown name; the message lists the choices.
    """
    if name not in FORMATS:
        raise KeyError(f"precision {name!r} is not one of {', '.join(FORMATS)}")
    return FORMATS[name]
