"""What a step of training reads, and how fast it learns: a function of the step's number, so runs can be resumed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import data
import numpy as np
import torch

PLAN = ("own", "own", "questions", "web", "fiction", "wikipedia", "legal", "code", "biomedical", "maths")
"""The windows of a step; those with a teacher come first."""
ALPHA = {"own": 0.0, "questions": 0.5, "web": 0.5}
"""Weight of the cross-entropy where it is not 1."""
BETA = {"own": 1.0, "questions": 0.5, "web": 0.5}
"""Weight of the divergence; these streams have a teacher."""


@dataclass(frozen=True)
class Options:
    """Every hyper-parameter of the run."""

    minutes: float = 70.0
    steps: int = 0
    scale: int = 1
    by_size: float = 0.0
    windows: tuple[tuple[str, int], ...] = ()
    experts: int = 8
    top_k: int = 2
    rank: int = 16
    length: int = 256
    factor_lr: float = 2e-3
    router_lr: float = 2e-4
    balance: float = 0.003
    gamma: float = 0.8
    sharpness: float = 0.7
    warmup: float = 0.03
    final_lr: float = 0.02
    clip: float = 1.0
    router_windows: int = 6
    drop: float = 0.0
    own_passes: int = 8
    save_seconds: float = 300.0
    validate_seconds: float = 1200.0
    validate_windows: int = 4
    seed: int = 20261123

    @property
    def plan(self) -> tuple[str, ...]:
        """The windows of a step, `scale` of each of `PLAN`, or as `sized` has them."""
        windows = self.windows or tuple((stream, self.scale) for stream in PLAN)
        return tuple(stream for stream, number in windows for _ in range(number))


def sized(options: Options, tokens: dict[str, np.ndarray]) -> Options:
    """The options with as many windows of a stream in a step as its size asks for, where `by_size` is not 0.

    A step has as many windows as before and as many own samples. Of the rest each stream has at least one, and what is
    left follows size ** `by_size`: at 0 all streams have as many and the small ones are read often, at 1 all are read
    equally often.

    Args:
        options: of the run.
        tokens: `<stream>.train` of every stream.
    """
    if not options.by_size:
        return options
    streams = [stream for stream in PLAN if stream != "own"]
    weight = np.array([float(len(tokens[f"{stream}.train"])) for stream in streams]) ** options.by_size
    quota = weight / weight.sum() * (len(streams) * options.scale)
    number = np.maximum(np.floor(quota), 1).astype(int)
    while (left := len(streams) * options.scale - number.sum()) > 0:
        number[np.argsort(number - quota, kind="stable")[:left]] += 1
    while number.sum() > len(streams) * options.scale:
        number[np.argmax(np.where(number > 1, number - quota, -np.inf))] -= 1
    own = PLAN.count("own") * options.scale
    return replace(options, windows=(("own", own), *zip(streams, number.tolist(), strict=True)))


def batch(tokens: dict[str, np.ndarray], step: int, options: Options) -> torch.Tensor:
    """The windows of a step: int64 [windows, length]. A pure function of the step."""
    rows, turn = [], dict.fromkeys(PLAN, 0)
    for stream in options.plan:
        number = step * options.plan.count(stream) + turn[stream]
        turn[stream] += 1
        seed = (options.seed, sorted(set(PLAN)).index(stream))
        if stream == "own":
            again, place = divmod(number, len(tokens["own"]))
            order = np.random.default_rng([*seed, again]).permutation(len(tokens["own"]))
            rows.append(tokens["own"][order[place]].astype(np.int64))
        else:
            rows.append(data.training_window(tokens[f"{stream}.train"], options.length, number, seed))
    return torch.from_numpy(np.stack(rows))


def rate(progress: float, options: Options) -> float:
    """Share of the peak learning rate: warm-up, then cosine."""
    if progress < options.warmup:
        return max(progress / options.warmup, 0.02)
    phase = min((progress - options.warmup) / (1 - options.warmup), 1.0)
    return options.final_lr + (1 - options.final_lr) * 0.5 * (1 + math.cos(math.pi * phase))


def spent(step: int, seconds: float, options: Options) -> float:
    """Share of the budget that is used up."""
    if options.steps:
        return step / options.steps
    return seconds / (options.minutes * 60) if options.minutes else 1.0
