"""The one exception that means: what the user gave is wrong.

The command line prints it as a single line and exits with 2; every other exception is a failure of Equipoise
itself and exits with 1.
"""

from __future__ import annotations


class InputError(ValueError):
    """Wrong input. The message says in one line what is wrong, where, and what to do about it."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))
