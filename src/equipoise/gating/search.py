"""Which plans of a front to measure, and which to accept: pure logic, no model.

Plans stand from the most balanced (0) to the safest (n - 1), in an order fixed before anything is measured. Behind
the safest stands the unchanged model, which loses nothing and needs no measuring.

    1. measure plan 0; inside the bound: accept it, done
    2. measure n - 1, n - 2, ... as long as they are inside; the first refusal ends the search
    3. accept the last that was inside; none: the unchanged model

Why not the two obvious ways. *Bisection* takes the order for the truth: one unlucky refusal in the middle sends it to
the wrong half, one lucky pass to plans behind a loss. Measured loss is noisy and a front orders its plans by
predicted loss, so monotone it is only by hope. *From the balanced end down until one passes* assumes nothing, but
asks n times whether noise will let a plan through: each question is wrong in at most 2.5 % of cases (one end of a
95 % interval), n of them in up to n * 2.5 %, and it is the lucky one that is accepted.

Here both questions are asked in a fixed order and a sequence ends at its first refusal. A plan truly outside can be
accepted only if plan 0 is wrongly passed, or if the first truly bad plan of step 2 is: at most 2 * 2.5 % = 5 %,
however many plans there are and whatever the shape of the front, with no correction of the intervals (fixed-sequence
testing: Maurer, Hothorn and Lehmacher 1995; as calibration, Angelopoulos et al., Learn then Test, arXiv 2110.01052).

What it gives: never a plan that was not measured inside; the most balanced of those measured inside; and where
measured loss does fall along the front, the most balanced admissible plan of all n. Where it does not, plans behind
the first refusal are left unmeasured, even if one of them would pass: that is the price.

Cost: 1 measurement when the most balanced plan passes, 2 when nothing does (1 if n is 1), at most n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def search(plans: int, inside: Callable[[int], bool]) -> int | None:
    """Find the plan to accept.

    Args:
        plans: n, from the most balanced, 0, to the safest, n - 1.
        inside: measures a plan and says whether it is inside the bound; asked at most once a plan.

    Returns:
        The plan; None for the unchanged model.
    """
    if plans and inside(0):
        return 0
    accepted = None
    for plan in range(plans - 1, 0, -1):
        if not inside(plan):
            break
        accepted = plan
    return accepted


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly spaced, the first and (from 2 on) the last among them."""
    if most >= len(items):
        return list(items)
    chosen = np.linspace(0, len(items) - 1, most).round().astype(int)
    return [items[i] for i in chosen]
