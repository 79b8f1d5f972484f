"""Reading text data: `.jsonl` and `.jsonl.gz` with a `text` field (and, if wanted, a `domain`), or `.txt`.

A JSON line is one document; a `.txt` file is one document. A document without a `domain` belongs to the
domain named after its file. Blank lines and documents of white space only are passed over; a file with
nothing else is refused, as is everything that is not what its name says, with the file and the line.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.errors import InputError

_SUFFIXES = (".jsonl", ".jsonl.gz", ".txt")


@dataclass(frozen=True)
class TextRecord:
    """One document.

    Attributes:
        text: never blank.
        domain: what kind of text it is: the line's own `domain`, else the file's name without its suffix.
    """

    text: str
    domain: str


def read_texts(paths: Iterable[str | Path]) -> list[TextRecord]:
    """Read the documents of all files, in order.

    Raises:
        InputError: no file given; a file is missing, empty, of another kind, not UTF-8, not JSON, or lacks
            the `text` field. The message names the file and, where there is one, the line.
    """
    records: list[TextRecord] = []
    files = [Path(path) for path in paths]
    if not files:
        raise InputError("no data file given: name at least one .jsonl, .jsonl.gz or .txt file")
    for path in files:
        before = len(records)
        suffix = _suffix(path)
        stem = path.name[: -len(suffix)]
        if suffix == ".txt":
            text = "".join(_lines(path))
            if text.strip():
                records.append(TextRecord(text, stem))
        else:
            records.extend(_record(row, f"data file {path}, line {number}", stem) for number, row in read_rows(path))
            # A document of white space has nothing to predict; it would only put two separators side by side.
            records[before:] = [record for record in records[before:] if record.text.strip()]
        if len(records) == before:
            raise InputError(f"data file {path} is empty: it holds no text")
    return records


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, JSON value) of each line of a `.jsonl` or `.jsonl.gz` file that is not blank.

    Raises:
        InputError: missing file, not UTF-8, not JSON, damaged gzip.
    """
    _suffix(path)
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"data file {path}, line {number} is not JSON ({error})") from error


def _suffix(path: Path) -> str:
    for suffix in _SUFFIXES:
        if path.name.endswith(suffix) and path.name != suffix:
            break
    else:
        raise InputError(f"data file {path} is of no known kind: {', '.join(_SUFFIXES)} are read")
    if path.is_dir():
        raise InputError(f"data file {path} is a directory: name the files in it")
    if not path.is_file():
        raise InputError(f"no such data file: {path}")
    return suffix


def _lines(path: Path) -> Iterator[str]:
    """Decoded lines with their ends. Split at newlines only: JSON strings may hold U+2028 and its like."""
    number = 0
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as handle:
            for number, raw in enumerate(handle, start=1):
                # A byte-order mark is what some editors put before UTF-8; it is no text.
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"data file {path}, line {number} is not UTF-8 (byte {error.start + 1}: {error.reason}); "
            "convert it, for example with iconv"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"data file {path} is not readable gzip after line {number} ({error})") from error


def _record(row: Any, where: str, stem: str) -> TextRecord:
    if not isinstance(row, dict):
        raise InputError(f'{where} is not a JSON object; each line needs the form {{"text": ...}}')
    if "text" not in row:
        fields = ", ".join(list(row)[:8]) or "none"
        raise InputError(f"{where} has no field 'text' (its fields: {fields})")
    text, domain = row["text"], row.get("domain")
    if not isinstance(text, str):
        raise InputError(f"{where}: field 'text' is a {type(text).__name__}, not a string")
    if domain is not None and not (isinstance(domain, str) and domain):
        raise InputError(f"{where}: field 'domain' is {domain!r}, not a name")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800" is JSON, but no character
        raise InputError(f"{where}: field 'text' holds half a surrogate pair at character {error.start}") from error
    return TextRecord(text, stem if domain is None else domain)
