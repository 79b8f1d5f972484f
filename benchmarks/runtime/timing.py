"""How this benchmark takes times: warm up, then all variants in turn, and ratios round by round.

    round           each variant is called once to three times, all in turn in random order; median of its calls
    ratio[r]        min over the baselines of their time in round r / time of the variant in round r
    figure          median over rounds of ratio[r], with the smallest and the largest beside it; above 1 is faster

A slow moment of the machine falls on all variants of its round. The best baseline is chosen anew in each round, which
favours the baselines where two of them are about equal. In turn also means that a variant finds caches filled by the
others, as one layer of a model finds them filled by the layers before it.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from equipoise.errors import InputError

Work = Callable[[], object]


@dataclass(frozen=True)
class Pace:
    """How long to measure.

    Attributes:
        seconds: aimed at for the rounds of one comparison.
        least, most: rounds, whatever the time.
        warm_seconds: at most so long for warming up each variant, beyond its first two calls.
    """

    seconds: float = 6.0
    least: int = 7
    most: int = 61
    warm_seconds: float = 1.5


QUICK = Pace(seconds=1.5, least=7, most=21, warm_seconds=0.3)


def seconds(work: Work) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def warm(work: Work, pace: Pace) -> float:
    """Call until the time is stable: two calls in a row within 5 % of the fastest.

    Returns:
        seconds of the fastest call.
    """
    best = seconds(work)
    spent, steady = 0.0, 0
    for call in range(50):
        took = seconds(work)
        spent += took
        steady = steady + 1 if took < 1.05 * best else 0
        best = min(best, took)
        if steady >= 2 or (call and spent > pace.warm_seconds):
            break
    return best


def race(variants: Mapping[str, Work], pace: Pace) -> dict[str, list[float]]:
    """Measure variants that are warm.

    Returns:
        name -> seconds in each round.
    """
    names, order = list(variants), random.Random(0)
    whole = sum(seconds(variants[name]) for name in names)
    calls = 3 if whole * 3 * pace.least < pace.seconds else 1
    rounds = int(min(pace.most, max(pace.least, pace.seconds / (whole * calls))))
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        taken: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(calls):
            order.shuffle(names)  # so that none always runs after the same one
            for name in names:
                taken[name].append(seconds(variants[name]))
        for name in names:
            times[name].append(statistics.median(taken[name]))
    return times


def compare(times: Mapping[str, Sequence[float]], baselines: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Speed of each variant against the best baseline of the round.

    Args:
        times: name -> seconds in each round.
        baselines: names among them; at least one.

    Returns:
        name -> `ms` (median), `ratio` (median over rounds), `min`, `max`, `rounds`.
    """
    best = [min(rounds) for rounds in zip(*(times[name] for name in baselines), strict=True)]
    out = {}
    for name, taken in times.items():
        ratios = [b / t for b, t in zip(best, taken, strict=True)]
        out[name] = {
            "ms": statistics.median(taken) * 1000,
            "ratio": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
            "rounds": len(ratios),
        }
    return out


def script(main: Callable[[], None]) -> None:
    """Run a command: wrong input is one line on stderr and exit status 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
