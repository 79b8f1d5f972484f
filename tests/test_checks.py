"""The checks that options share."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from equipoise.checks import at_least, one_of, whole, within
from equipoise.errors import InputError


@pytest.mark.parametrize(
    ("check", "arguments", "message"),
    [
        (one_of, ("a", ("b", "c")), "x: 'a' is not one of b, c"),
        (at_least, (0, 1), "x must be at least 1, got 0"),
        (at_least, (-1, 0), "x must not be negative, got -1"),
        (at_least, (math.nan, 0), "x must not be negative, got nan"),
        (within, (1.5, 0, 1), "x must be in [0, 1], got 1.5"),
        (within, (math.nan, 0, 1), "x must be in [0, 1], got nan"),
        (whole, (1.0, 0, 5), "x must be a whole number in [0, 5], got 1.0"),
        (whole, (True, 0, 5), "x must be a whole number in [0, 5], got True"),
        (whole, (6, 0, 5), "x must be a whole number in [0, 5], got 6"),
    ],
)
def test_refusals(check: Callable[..., None], arguments: tuple[object, ...], message: str):
    with pytest.raises(InputError) as error:
        check("x", *arguments)
    assert str(error.value) == message


def test_what_passes():
    one_of("x", "b", ("b", "c"))
    at_least("x", 1, 1)
    within("x", 0.0, 0, 1)
    within("x", 1.0, 0, 1)
    whole("x", 5, 0, 5)
