"""Versioned JSON documents: the checks that plans and metrics share before their own."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from equipoise.errors import InputError

M = TypeVar("M", bound=BaseModel)


def validated(schema: type[M], document: Any, *, what: str, format: str, version: int, command: str) -> M:
    """Check format, version and schema of a document.

    Args:
        schema: pydantic model of the whole document.
        document: plain JSON values.
        what: how the message begins when it is no object, e.g. "a plan is".
        format: what its `format` key must say.
        version: the one that is readable.
        command: what makes such a document.

    Raises:
        InputError: naming the key and what is wrong with it.
    """
    if not isinstance(document, dict):
        raise InputError(f"{what} a JSON object")
    if document.get("format") != format:
        raise InputError(f"format is {document.get('format')!r}, not {format!r}; make one with `{command}`")
    if document.get("version") != version:
        raise InputError(f"version {document.get('version')!r} is not readable by this release (it reads {version})")
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        kind = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        raise InputError(f"{where}: {kind}") from error
