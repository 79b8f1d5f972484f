"""Command-line options read off a frozen dataclass, so that names, defaults and help cannot drift from it.

A field `max_quantized: float = 1.0` becomes `--max-quantized FLOAT` with the field's default; its help is the
field's entry under `Attributes:` in the class docstring. `X | None` fields default to "chosen by the preset".
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click

F = TypeVar("F", bound=Callable[..., Any])
D = TypeVar("D")


def attribute_help(cls: type) -> dict[str, str]:
    """Field -> its text under `Attributes:` in the class docstring, on one line."""
    text = (cls.__doc__ or "").partition("Attributes:")[2]
    found = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", text, re.MULTILINE)
    return {name: " ".join(body.split()).replace("`", "") for name, body in found}


def options_of(cls: type, *, leave_out: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Decorator: one click option a field of the dataclass `cls`, in the order of the fields."""
    helps = attribute_help(cls)
    hints = get_type_hints(cls)

    def decorate(function: F) -> F:
        for field in reversed(dataclasses.fields(cls)):
            if field.name not in leave_out:
                function = _option(field, hints[field.name], helps[field.name])(function)
        return function

    return decorate


def _option(field: dataclasses.Field[Any], hint: Any, text: str) -> Callable[[F], F]:
    flag = "--" + field.name.replace("_", "-")
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kind = next(member for member in members if member is not type(None))
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", field.name, default=field.default, show_default=True, help=text)
    choice: Any = click.Choice(get_args(kind)) if get_origin(kind) is Literal else kind
    shown = field.default is not None
    return click.option(flag, field.name, type=choice, default=field.default, show_default=shown, help=text)


def take(cls: type[D], values: dict[str, Any]) -> D:
    """Build the dataclass from a command's keyword arguments, removing the ones it takes from `values`."""
    names = [field.name for field in dataclasses.fields(cls) if field.name in values]  # type: ignore[arg-type]
    return cls(**{name: values.pop(name) for name in names})
