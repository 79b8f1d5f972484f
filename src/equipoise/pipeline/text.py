"""Which text calibrates and which is held out: never the same windows.

With held-out files given, calibration uses all of `--data`. Otherwise the windows of each domain are cut: the
first `share` calibrates, the rest is held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.errors import InputError
from equipoise.evaluation.data import Window, windows
from equipoise.files.text import read_texts


@dataclass(frozen=True)
class Split:
    """Windows of the two parts and a line that says where they are from."""

    calibration: list[Window]
    heldout: list[Window]
    described: str


def split_text(
    tokenizer: Any, data: Sequence[Path], heldout: Sequence[Path], *, seq_len: int, share: float, names: str = ""
) -> Split:
    """Read the files and cut them into calibration and held-out windows.

    Args:
        tokenizer: of the model.
        data: files to calibrate on.
        heldout: files to score on; empty: a part of `data`.
        seq_len: tokens a window.
        share: share of the windows that calibrates when there are no held-out files.
        names: what to call the files in the profile; their names otherwise.

    Raises:
        InputError: a file is wrong, or there are too few tokens for both parts.
    """
    first = windows(tokenizer, read_texts(data), seq_len)
    named = names or ", ".join(path.name for path in data)
    if heldout:
        second = windows(tokenizer, read_texts(heldout), seq_len)
        return Split(first, second, named)
    calibration: list[Window] = []
    rest: list[Window] = []
    for domain in dict.fromkeys(window.domain for window in first):
        members = [window for window in first if window.domain == domain]
        cut = round(len(members) * share)
        calibration += members[:cut]
        rest += members[cut:]
    if not calibration or not rest:
        raise InputError(
            f"{named}: fewer tokens than needed: {len(first)} windows of {seq_len} tokens cannot be split at {share:g} "
            "into calibration and held-out text; give more text, a shorter --seq-len, or --heldout files"
        )
    return Split(calibration, rest, f"{named}, first {share:.0%} of each domain")


def hold_back(items: list[Window], share: float) -> tuple[list[Window], list[Window]]:
    """Part windows into those to use and those to keep apart: the last `share` of each domain.

    The last, not every n-th: a window beside one that is used comes from the same document.

    Args:
        items: windows; each domain keeps its order.
        share: of the windows of a domain, in (0, 1).

    Returns:
        (used, kept apart). The only window of a domain is used.
    """
    used: list[Window] = []
    apart: list[Window] = []
    for domain in dict.fromkeys(window.domain for window in items):
        members = [window for window in items if window.domain == domain]
        cut = max(1, round(len(members) * (1 - share)))
        used += members[:cut]
        apart += members[cut:]
    return used, apart


def thin(items: list[Window], seq_len: int, *, fraction: float = 1.0, max_tokens: int = 0) -> list[Window]:
    """A part of the windows, spread evenly over them.

    Args:
        items: windows.
        seq_len: tokens a window.
        fraction: share to keep.
        max_tokens: at most about this many tokens (0 = no limit).
    """
    keep = max(1, round(len(items) * fraction))
    if max_tokens:
        keep = min(keep, max(1, max_tokens // seq_len))
    if keep >= len(items):
        return items
    chosen = np.floor((np.arange(keep) + 0.5) * len(items) / keep).astype(int)
    return [items[i] for i in chosen]
