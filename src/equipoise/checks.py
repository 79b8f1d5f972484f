"""Checks of single values that options share: one wording each, refused with `InputError`."""

from __future__ import annotations

from collections.abc import Sequence

from equipoise.errors import InputError


def one_of(what: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is not among the choices, and list them."""
    if value not in choices:
        raise InputError(f"{what}: {value!r} is not one of {', '.join(choices)}")


def at_least(what: str, value: float, low: float) -> None:
    """Refuse a number below `low`, and NaN."""
    if not value >= low:
        raise InputError(f"{what} must {'not be negative' if low == 0 else f'be at least {low:g}'}, got {value}")


def within(what: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside [low, high], and NaN."""
    if not low <= value <= high:
        raise InputError(f"{what} must be in [{low:g}, {high:g}], got {value}")


def whole(what: str, value: object, low: int, high: int) -> None:
    """Refuse what is no whole number in [low, high]; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{what} must be a whole number in [{low}, {high}], got {value!r}")
