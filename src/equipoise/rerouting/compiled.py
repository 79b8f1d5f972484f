"""The whole decision of one layer as one compiled call: what `selection` defines, for scores that lie on the CPU.

A decoding step has one row a text, so a tensor operation costs more than what it computes; and a prompt has so many
rows that each of `rounds` passes over tensors would cost more than the router. Here a row's pool is found in one pass
over its scores, and in each round of prices a row's places are put in order again from the order of the round before,
which prices change little.

    places of a row     [k - keep of the family's choice | up to `extra` others of its pool], best first
    pick of a row       the k - keep places with the largest value - price, the better score first where they are equal

Tests hold it to the tensor form, decision by decision.

T tokens, C classes of the router (E experts, and perhaps one that is none), k experts a token selects, F free tokens.
"""

from __future__ import annotations

import math

import numpy as np

from equipoise.planning.kernels import compiled

DECAY = 0.85
"""Of the steps: 20 rounds end at 5 % of the first. docs/experiments.md has the distance to the optimum."""
HIGHEST = 2.0
"""Price at which every token that can leave does: values are at most 1."""

NOT_FINITE = -1


@compiled
def decide(
    scores: np.ndarray,
    p: np.ndarray,
    index: np.ndarray,
    real: np.ndarray,
    slots: np.ndarray,
    before: np.ndarray,
    experts: int,
    gap: float,
    mass: float,
    extra: int,
    rounds: int,
    target: float,
    keep: int,
    first: float,
) -> tuple[int, int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The experts of each token, and the load they make.

    Args:
        scores: float32 [T, C], what the family selects by.
        p: float32 [T, C]: the softmax of the scores where they are logits, else the scores.
        index: int64 [T, k], the family's choice.
        real: bool [T], or [0] when all rows are real.
        slots: float32 [C], what an expert's load is divided by; inf for a class that is no expert.
        before: float32 [C], load that counts beside this batch's.
        experts: E.
        gap: of the rule, as are mass, extra, rounds, target; `rounds` 0 keeps the family's choice.
        mass: see there.
        extra: see there.
        rounds: see there.
        target: see there.
        keep: strongest experts that no token gives up, at most k - 1.
        first: step of the first round.

    Returns:
        tokens that are real, or NOT_FINITE when a chosen score is NaN or infinite; tokens moved; the choice
        int64 [T, k] (a row that keeps its experts is the family's, also in order); its scores float32 [T, k], where
        tokens moved (else [0, 0]); moved bool [T]; load float32 [C].
    """
    rows, k = index.shape
    classes = scores.shape[1]
    all_real = len(real) == 0
    n = k - keep
    places = n + min(extra, max(classes - k, 0))
    chosen = index.copy()
    held = np.empty((0, 0), np.float32)
    moved = np.zeros(rows, np.bool_)
    load = np.zeros(classes, np.float32)
    tokens = 0
    for t in range(rows):
        if all_real or real[t]:
            tokens += 1
            for i in range(k):
                if not math.isfinite(scores[t, index[t, i]]):
                    return NOT_FINITE, 0, chosen, held, moved, load
                load[index[t, i]] += np.float32(1)
    if tokens == 0 or rounds == 0 or places == n:
        return tokens, 0, chosen, held, moved, load

    value = np.empty((tokens, places), np.float32)
    expert = np.empty((tokens, places), np.int64)
    strongest = np.empty((tokens, keep), np.int64)
    used = np.empty(tokens, np.int64)
    row_of = np.empty(tokens, np.int64)
    fixed = before + load
    free = 0
    own = np.empty(k, np.int64)
    row = np.empty(classes, np.float32)
    for t in range(rows):
        if not (all_real or real[t]):
            continue
        found = _pool(p[t], scores[t], index[t], experts, gap, mass, keep, row, own, value[free], expert[free])
        if found == n:
            continue
        for i in range(keep):
            strongest[free, i] = own[i]
        for i in range(n):
            fixed[expert[free, i]] -= np.float32(1)
        used[free] = found
        row_of[free] = t
        free += 1
    if free == 0:
        return tokens, 0, chosen, held, moved, load

    whole, width = np.float32(0), np.float32(0)
    for e in range(classes):
        whole += fixed[e]
        if math.isfinite(slots[e]):
            width += slots[e]
    per_slot = (whole + np.float32(free * n)) / width * np.float32(target)
    best = _prices(value[:free], expert[:free], used[:free], slots, fixed, n, rounds, per_slot, first)

    changed = 0
    offer = np.empty(places, np.float32)
    order = np.empty(places, np.int64)
    for f in range(free):
        m = used[f]
        for j in range(m):
            order[j] = j
        _arrange(order, offer, value[f], expert[f], best, m)
        out = False
        for i in range(n):
            out = out or order[i] >= n
        if not out:
            continue
        t = row_of[f]
        changed += 1
        moved[t] = True
        picked = np.sort(order[:n])
        for i in range(k):
            load[index[t, i]] -= np.float32(1)
        for i in range(keep):
            chosen[t, i] = strongest[f, i]
        for i in range(n):
            chosen[t, keep + i] = expert[f, picked[i]]
        for i in range(k):
            load[chosen[t, i]] += np.float32(1)
    if changed:
        held = np.empty((rows, k), np.float32)
        for t in range(rows):
            for i in range(k):
                held[t, i] = scores[t, chosen[t, i]]
    return tokens, changed, chosen, held, moved, load


@compiled
def _pool(
    p: np.ndarray,
    scores: np.ndarray,
    index: np.ndarray,
    experts: int,
    gap: float,
    mass: float,
    keep: int,
    row: np.ndarray,
    own: np.ndarray,
    value: np.ndarray,
    expert: np.ndarray,
) -> int:
    """Fill in the places of one token (value and expert [P]) and its choice, best first (own [k]).

    Returns:
        How many places; k - keep when the token has nothing to exchange.
    """
    k = len(index)
    n = k - keep
    # As `selection.distribution`, up to a factor: ruled out is 0, and a bias below 0 moves all scores up.
    lowest = np.float32(0)
    for e in range(len(p)):
        if scores[e] != np.float32(0) and p[e] > np.float32(-np.inf):
            lowest = min(lowest, p[e])
    for e in range(len(p)):
        out = e >= experts or (scores[e] == np.float32(0) and lowest < np.float32(0)) or p[e] == np.float32(-np.inf)
        row[e] = np.float32(0) if out else p[e] - lowest
    held, total = np.float32(0), np.float32(0)
    for i in range(k):
        e = index[i]
        j = i
        while j > 0 and (row[e] > row[own[j - 1]] or (row[e] == row[own[j - 1]] and e < own[j - 1])):
            own[j] = own[j - 1]
            j -= 1
        own[j] = e
    for i in range(k):
        held += row[own[i]]
    if mass < 1:
        for e in range(len(p)):
            total += row[e]
        if held > np.float32(mass) * total:
            return n
    held = max(held, np.float32(1e-20))
    kth = row[own[k - 1]]
    for i in range(n):
        expert[i] = own[keep + i]
        value[i] = row[own[keep + i]] / held
    last = kth / held
    found = n
    for i in range(k):
        row[own[i]] = np.float32(-1)
    lowest_value = (last - np.float32(gap)) * held * np.float32(0.9999)
    for e in range(experts):
        if row[e] <= np.float32(0) or row[e] < lowest_value:
            continue
        if row[e] > kth:
            # A family that rules experts out by a score that others fall below (AXK2) chose what p says it cannot.
            return n
        score = row[e] / held
        if last - score > np.float32(gap):
            continue
        j = found
        if found == len(value):
            if score <= value[found - 1]:
                continue
            j = found - 1
        else:
            found += 1
        while j > n and score > value[j - 1]:
            value[j] = value[j - 1]
            expert[j] = expert[j - 1]
            j -= 1
        value[j] = score
        expert[j] = e
    return found


@compiled
def _arrange(
    order: np.ndarray, offer: np.ndarray, value: np.ndarray, expert: np.ndarray, price: np.ndarray, m: int
) -> None:
    """Put the m places of one token in order: largest value - price first, then the smaller place."""
    for j in range(m):
        offer[j] = value[j] - price[expert[j]]
    for i in range(1, m):
        place = order[i]
        mine = offer[place]
        j = i
        while j > 0 and (mine > offer[order[j - 1]] or (mine == offer[order[j - 1]] and place < order[j - 1])):
            order[j] = order[j - 1]
            j -= 1
        order[j] = place


@compiled
def _prices(
    value: np.ndarray,
    expert: np.ndarray,
    used: np.ndarray,
    slots: np.ndarray,
    fixed: np.ndarray,
    n: int,
    rounds: int,
    per_slot: np.float32,
    first: float,
) -> np.ndarray:
    """Prices [C] of the round with the least busy slot: value and expert [F, P], `used` [F] places of each token."""
    free, places = value.shape
    price = np.zeros(len(slots), np.float32)
    best = price.copy()
    load = np.empty(len(slots), np.float32)
    order = np.empty((free, places), np.int64)
    offer = np.empty(places, np.float32)
    for f in range(free):
        for j in range(places):
            order[f, j] = j
    least = np.float32(np.inf)
    step = first
    for r in range(rounds + 1):
        load[:] = fixed
        for f in range(free):
            if r:
                _arrange(order[f], offer, value[f], expert[f], price, used[f])
            for i in range(n):
                load[expert[f, order[f, i]]] += np.float32(1)
        busiest = np.float32(0)
        for e in range(len(slots)):
            load[e] = load[e] / slots[e] / per_slot
            busiest = max(busiest, load[e])
        if busiest < least:
            least = busiest
            best[:] = price
            if busiest <= np.float32(1):
                break
        for e in range(len(slots)):
            moved = price[e] + np.float32(step) * (load[e] - np.float32(1))
            price[e] = min(max(moved, np.float32(0)), np.float32(HIGHEST))
        step *= DECAY
    return best
