"""A part of a profile or trace: steps of its series, tokens of its per-token ids, windows of tokens.

A range is `A:B`, either end a number, a percentage of the whole (`0:10%`), or left out. Percentages are rounded
down, so that `0:10%` and `10%:` together are the whole and share nothing.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from equipoise.errors import InputError
from equipoise.types import IntArray, Profile

_END = re.compile(r"(\d+(?:\.\d+)?)(%?)")


def parse_range(text: str, total: int, what: str) -> tuple[int, int]:
    """The half-open range that `text` means of `total` things.

    Args:
        text: `A:B`; numbers, percentages (`10%`), or nothing for an end.
        total: how many there are.
        what: their name, for the message.

    Raises:
        InputError: not a range, empty, or beyond the end.
    """
    ends = text.split(":")
    if len(ends) != 2:
        raise InputError(f"{what} {text!r} is not a range: give A:B, for example 0:10% or 100:")
    start, stop = (_end(end, default, total, what, text) for end, default in zip(ends, (0, total), strict=True))
    if stop > total:
        raise InputError(f"{what} {text!r} ends at {stop}, but there are {total}")
    if start >= stop:
        raise InputError(f"{what} {text!r} is empty: it means {start}:{stop} of {total}")
    return start, stop


def _end(text: str, default: int, total: int, what: str, whole: str) -> int:
    """One end of a range."""
    if not text.strip():
        return default
    match = _END.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{what} {whole!r}: {text!r} is neither a number nor a percentage")
    number, percent = match.groups()
    if percent:
        return int(float(number) * total / 100 + 1e-9)
    if "." in number:
        raise InputError(f"{what} {whole!r}: {text!r} is not whole; for a fraction write {float(number) * 100:g}%")
    return int(number)


def window_counts(topk_ids: np.ndarray, num_experts: int, window: int) -> IntArray:
    """Loads of consecutive windows of tokens.

    Args:
        topk_ids: [T, L, k] expert ids.
        num_experts: E.
        window: tokens a window; fewer tokens than that are one window, a rest at the end is left out.

    Returns:
        int64 [windows, L, E].
    """
    tokens, layers, _ = topk_ids.shape
    window = min(window, tokens)
    windows = tokens // window
    ids = topk_ids[: windows * window].astype(np.int64)
    where = np.arange(windows).repeat(window)[:, None, None] * layers + np.arange(layers)[None, :, None]
    flat = np.bincount((where * num_experts + ids).ravel(), minlength=windows * layers * num_experts)
    return flat.reshape(windows, layers, num_experts).astype(np.int64)


def take(profile: Profile, steps: str | None = None, tokens: str | None = None, window: int | None = None) -> Profile:
    """The part of a profile that was asked for, as a profile whose counts and series fit that part.

    Args:
        profile: a profile or trace.
        steps: range of steps of its `series`.
        tokens: range of tokens of its `topk_ids`.
        window: make `series` from windows of so many tokens of `topk_ids`.

    Raises:
        InputError: the profile has no series or no per-token ids, or a range is wrong.
    """
    if steps is not None and (tokens is not None or window is not None):
        raise InputError("steps is a part of the series, tokens and window of the per-token ids: give one kind")
    if steps is not None:
        if profile.series is None:
            raise InputError(
                "steps needs a profile with a series of windows; this one has only its total" + _has(profile)
            )
        start, stop = parse_range(steps, len(profile.series), "steps")
        series = profile.series[start:stop]
        return replace(profile, series=series, counts=series.sum(0), topk_ids=None)
    if tokens is None and window is None:
        return profile
    if profile.topk_ids is None:
        raise InputError("tokens and window need per-token ids (topk_ids), which this profile has not" + _has(profile))
    if window is not None and window < 1:
        raise InputError(f"window is a number of tokens and must be at least 1, got {window}")
    ids = profile.topk_ids
    start, stop = parse_range(tokens if tokens is not None else ":", len(ids), "tokens")
    ids = ids[start:stop]
    if window is None:
        return replace(profile, counts=window_counts(ids, profile.num_experts, len(ids))[0], series=None, topk_ids=ids)
    series = window_counts(ids, profile.num_experts, window)
    return replace(
        profile, counts=series.sum(0), series=series, topk_ids=ids[: len(ids) // min(window, len(ids)) * window]
    )


def _has(profile: Profile) -> str:
    """What can be asked for instead."""
    if profile.series is not None:
        return f": it has a series of {len(profile.series)} steps, use --steps"
    if profile.topk_ids is not None:
        return f": it has ids of {len(profile.topk_ids)} tokens, use --tokens and --window"
    return ""
