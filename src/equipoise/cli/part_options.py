"""Options that take a part of a profile or trace, shared by `plan` and `score`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def part_options(function: F) -> F:
    """Add --steps, --tokens and --window."""
    for decorate in (
        click.option(
            "--window",
            type=int,
            metavar="W",
            help="Cut per-token ids into windows of W tokens (a short rest is left out).",
        ),
        click.option("--tokens", metavar="A:B", help="Use this range of tokens of per-token ids, e.g. 0:10% or 1024:."),
        click.option("--steps", metavar="A:B", help="Use this range of steps of the series, e.g. 0:3 or 10%:."),
    ):
        function = decorate(function)
    return function
