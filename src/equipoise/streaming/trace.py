"""A stream of load from traces: windows, each of one or more parts in order.

A trace with per-token ids (`topk_ids`) is cut into windows of W tokens and each window into parts, because which
tokens came last is known; a `series` has its steps as windows, of one part each. Traces are joined in the order
given: tokens first, so that a window may span the seam, as it does in a service.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from equipoise.errors import InputError
from equipoise.files import load_profile
from equipoise.planning.parts import window_counts
from equipoise.types import FloatArray, IntArray, Profile

PARTS = 8
"""Parts of a window of tokens."""


def part_edges(window: int, parts: int = PARTS) -> IntArray:
    """First token of each part of a window, and its end: int64 [P + 1], parts as even as they can be."""
    number = min(parts, window)
    return np.arange(number + 1) * window // number


@dataclass(frozen=True)
class Stream:
    """What is replayed.

    Attributes:
        parts: float64 [N, P, L, E] selections in each part of each window.
        names: where each window begins: (window, name of the trace).
        window: tokens a window, 0 for a series.
        slot_bytes: int64 [L, E] bytes of one slot at the original precision; None when no trace says.
    """

    parts: FloatArray
    names: tuple[tuple[int, str], ...] = ()
    window: int = 0
    slot_bytes: IntArray | None = None

    @property
    def windows(self) -> FloatArray:
        """float64 [N, L, E]."""
        return self.parts.sum(1)


def load_stream(paths: Sequence[Path], window: int | None = None) -> Stream:
    """Read one or more traces as one stream.

    Args:
        paths: profiles or traces, in order.
        window: tokens a window, for traces with per-token ids. None: 512, or the series where there are no ids.

    Raises:
        InputError: a trace has neither ids nor a series, they do not fit together, or there are too few windows.
    """
    if not paths:
        raise InputError("no trace: give one or more with --trace FILE.npz")
    profiles = [load_profile(path) for path in paths]
    for path, profile in zip(paths, profiles, strict=True):
        if profile.counts.shape != profiles[0].counts.shape:
            raise InputError(
                f"{path} has {profile.num_layers} layers of {profile.num_experts} experts, {paths[0]} has "
                f"{profiles[0].num_layers} of {profiles[0].num_experts}: only traces of one model can be joined"
            )
        if profile.top_k and profiles[0].top_k and profile.top_k != profiles[0].top_k:
            raise InputError(f"{path} has top_k {profile.top_k}, {paths[0]} has {profiles[0].top_k}: join one model's")
    if window is not None and window < 1:
        raise InputError(f"window is a number of tokens and must be at least 1, got {window}")
    if all(profile.topk_ids is not None for profile in profiles):
        stream = _from_ids(profiles, paths, window or 512)
    else:
        stream = _from_series(profiles, paths, window)
    if len(stream.parts) < 3:
        raise InputError(
            f"the stream has {len(stream.parts)} windows, at least 3 are needed: "
            + ("use a smaller --window" if stream.window else "join more traces")
        )
    return stream


def _from_ids(profiles: list[Profile], paths: Sequence[Path], window: int) -> Stream:
    ids = [profile.topk_ids for profile in profiles if profile.topk_ids is not None]
    if len({i.shape[2] for i in ids}) > 1:
        raise InputError(f"{', '.join(map(str, paths))} select different numbers of experts a token: join one model's")
    joined = np.concatenate(ids)
    count = len(joined) // window
    if not count:
        raise InputError(f"{len(joined)} tokens are less than one window of {window}: use a smaller --window")
    edges = part_edges(window)
    folded = joined[: count * window].reshape(count, window, *joined.shape[1:])
    experts = profiles[0].num_experts
    parts = np.empty((count, len(edges) - 1, *profiles[0].counts.shape))
    for p, (begin, end) in enumerate(itertools.pairwise(edges)):
        tokens = folded[:, begin:end].reshape(-1, *joined.shape[1:])
        parts[:, p] = window_counts(tokens, experts, int(end - begin))
    starts = np.cumsum([0, *(len(i) for i in ids[:-1])]) // window
    return Stream(parts, _names(starts, paths), window, _bytes(profiles))


def _from_series(profiles: list[Profile], paths: Sequence[Path], window: int | None) -> Stream:
    for path, profile in zip(paths, profiles, strict=True):
        if profile.series is None:
            has = "per-token ids, another trace has not" if profile.topk_ids is not None else "only its total"
            raise InputError(f"{path} has no series of windows ({has}): a stream needs one kind throughout")
    if window is not None:
        raise InputError("window cuts per-token ids (topk_ids); these traces have a series: leave --window out")
    series = [profile.series for profile in profiles if profile.series is not None]
    starts = np.cumsum([0, *(len(s) for s in series[:-1])])
    return Stream(np.concatenate(series)[:, None].astype(np.float64), _names(starts, paths), 0, _bytes(profiles))


def _names(starts: IntArray, paths: Sequence[Path]) -> tuple[tuple[int, str], ...]:
    return tuple((int(start), Path(path).stem) for start, path in zip(starts, paths, strict=True))


def _bytes(profiles: list[Profile]) -> IntArray | None:
    return next((p.expert_bytes["original"] for p in profiles if "original" in p.expert_bytes), None)
