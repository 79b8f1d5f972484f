"""Local search over layouts and replica counts together, for one or several windows of load.

Packing after replication looks at each once. The search looks back: it swaps slots between ranks, and it takes a
replica from one expert and gives its place to another (a transfer), whichever lowers

    potential = sum_w sum_g (rank load[w, g] / mean rank load[w]) ^ p

most. With p large this is the busiest rank of the worst windows, but unlike a maximum it also falls when one of
several equally busy ranks is relieved, and it is a sum over ranks, so a move is priced from the ranks it touches.

Only moves that touch the rank with the largest part of the potential are tried; when it has none that helps, the
next ones are, up to `PATIENCE` ranks. With many ranks only the `PARTNERS` least loaded (to take load) and the
`DONORS` busiest (to be relieved by a replica) are looked at, so that a step costs O(W C^2 PARTNERS) whatever G.
Layouts as in `packing`; legend there. W windows. Compiled.
"""

from __future__ import annotations

import numpy as np

from equipoise.planning.kernels import compiled
from equipoise.planning.packing import PARTNERS, holdings
from equipoise.types import FloatArray, IntArray

PATIENCE = 3
DONORS = 16
LEAST_GAIN = 1e-7


@compiled
def _power(x: float, squarings: int) -> float:
    """Raise to the power 2 ** squarings (a negative of rounding counts as 0)."""
    x = max(x, 0.0)
    for _ in range(squarings):
        x *= x
    return x


@compiled
def window_loads(table: IntArray, load: FloatArray, replicas: IntArray) -> FloatArray:
    """Load of each rank in each window, [G, W].

    Args:
        table: [G, C] layout.
        load: [E + 1, W] load of each expert (the dummy's is 0).
        replicas: int64 [E + 1] slots of each expert (the dummy's is 1).
    """
    out = np.zeros((table.shape[0], load.shape[1]))
    for g in range(table.shape[0]):
        for j in range(table.shape[1]):
            e = table[g, j]
            for w in range(load.shape[1]):
                out[g, w] += load[e, w] / replicas[e]
    return out


@compiled
def _part(row: FloatArray, squarings: int) -> float:
    """Potential of one rank."""
    total = 0.0
    for w in range(row.shape[0]):
        total += _power(row[w], squarings)
    return total


@compiled
def _swap_gain(
    row_a: FloatArray, row_b: FloatArray, x: FloatArray, y: FloatArray, rx: int, ry: int, squarings: int, most: float
) -> float:
    """Potential of ranks a and b after x and y changed places; stops early when it exceeds `most`."""
    total = 0.0
    for w in range(row_a.shape[0]):
        d = x[w] / rx - y[w] / ry
        total += _power(row_a[w] - d, squarings) + _power(row_b[w] + d, squarings)
        if total > most:
            return total
    return total


@compiled
def _hosts(table: IntArray, experts: int, slots: int) -> tuple[IntArray, IntArray]:
    """Ranks of each expert's slots, int64 [E + 1, room], and how many there are."""
    room = 4
    while True:
        hosts = np.empty((experts + 1, room), dtype=np.int64)
        count = np.zeros(experts + 1, dtype=np.int64)
        fits = True
        for g in range(table.shape[0]):
            for j in range(table.shape[1]):
                e = table[g, j]
                if e == experts:
                    continue
                if count[e] == room:
                    fits = False
                    break
                hosts[e, count[e]] = g
                count[e] += 1
        if fits:
            return hosts, count
        room = min(2 * room, slots)


@compiled
def _rehost(hosts: IntArray, replicas: IntArray, expert: int, old: int, new: int) -> None:
    """Replace one rank in an expert's list; the dummy has none."""
    if expert == hosts.shape[0] - 1:
        return
    for i in range(replicas[expert]):
        if hosts[expert, i] == old:
            hosts[expert, i] = new
            return


@compiled
def _transfer_gain(
    loads: FloatArray, part: FloatArray, hosts: IntArray, load: FloatArray, replicas: IntArray,
    g: int, x: int, y: int, squarings: int,
) -> float:  # fmt: skip
    """How much the potential falls when the slot of x on rank g becomes one of y (x stands on g once, y not)."""
    gain = part[g]
    rx, ry = replicas[x], replicas[y]
    # x's tokens move from its slot on g to its others; y's others give tokens to its new slot on g.
    more, less = 1.0 / (rx - 1) - 1.0 / rx, 1.0 / (ry + 1) - 1.0 / ry
    for w in range(load.shape[1]):
        gain -= _power(loads[g, w] - load[x, w] / rx + load[y, w] / (ry + 1), squarings)
    for i in range(rx):
        h = hosts[x, i]
        if h == g:
            continue
        shared = False
        for k in range(ry):
            shared = shared or hosts[y, k] == h
        gain += part[h]
        for w in range(load.shape[1]):
            gain -= _power(loads[h, w] + more * load[x, w] + (less * load[y, w] if shared else 0.0), squarings)
    for i in range(ry):
        h = hosts[y, i]
        shared = False
        for k in range(rx):
            shared = shared or hosts[x, k] == h
        if shared:
            continue
        gain += part[h]
        for w in range(load.shape[1]):
            gain -= _power(loads[h, w] + less * load[y, w], squarings)
    return gain


@compiled
def objective(loads: FloatArray) -> float:
    """Mean over windows of the busiest rank's load, from [G, W]."""
    total = 0.0
    for w in range(loads.shape[1]):
        total += loads[:, w].max()
    return total / loads.shape[1]


@compiled
def search(
    table: IntArray,
    replicas: IntArray,
    load: FloatArray,
    squarings: int,
    transfers: bool,
    most: int,
    enough: float,
) -> int:
    """Improve a layout until no move lowers the potential; in place.

    Args:
        table: int64 [G, C] layout, changed.
        replicas: int64 [E + 1] slots of each expert, the last the dummy's (1), changed by transfers.
        load: float64 [E + 1, W] load of each expert in units of the mean rank load of the window; the last row 0.
        squarings: p = 2 ** squarings.
        transfers: whether replica counts may change.
        most: at most so many moves.
        enough: stop when the objective (mean over windows of the busiest rank) is no more than this.

    Returns:
        Moves made.
    """
    ranks, places = table.shape
    experts = load.shape[0] - 1
    on = holdings(table, experts)
    loads = window_loads(table, load, replicas)
    part = np.empty(ranks)
    for g in range(ranks):
        part[g] = _part(loads[g], squarings)
    slots = ranks * places
    hosts, _ = _hosts(table, experts, slots)
    near, donors = min(PARTNERS, ranks), min(DONORS, ranks)
    if ranks <= PARTNERS:
        donors = ranks
    for move in range(most):
        if objective(loads) <= enough:
            return move
        order = np.argsort(-part, kind="mergesort")
        least = part.sum() * LEAST_GAIN
        kind, best, m1, m2, m3, m4 = 0, least, -1, -1, -1, -1
        for i in range(min(PATIENCE, ranks)):
            a = order[i]
            for j in range(places):
                x = table[a, j]
                for q in range(near):
                    b = order[ranks - 1 - q]
                    if b == a or on[b, x] > 0:
                        continue
                    now = part[a] + part[b]
                    for k in range(places):
                        y = table[b, k]
                        if on[a, y] > 0:
                            continue
                        gain = now - _swap_gain(
                            loads[a], loads[b], load[x], load[y], replicas[x], replicas[y], squarings, now - best
                        )
                        if gain > best:
                            kind, best, m1, m2, m3, m4 = 1, gain, a, j, b, k
            if transfers:
                for j in range(places):
                    x = table[a, j]
                    if x == experts:
                        continue
                    if replicas[x] > 1 and on[a, x] == 1:
                        for q in range(donors):
                            h = order[q]
                            for k in range(places):
                                y = table[h, k]
                                if y < experts and on[a, y] == 0:
                                    gain = _transfer_gain(loads, part, hosts, load, replicas, a, x, y, squarings)
                                    if gain > best:
                                        kind, best, m1, m2, m3, m4 = 2, gain, a, j, y, -1
                    if replicas[x] >= ranks or on[a, x] > 1:
                        continue
                    for q in range(near):
                        b = order[ranks - 1 - q]
                        if b == a or on[b, x] > 0:
                            continue
                        for k in range(places):
                            y = table[b, k]
                            if y < experts and replicas[y] > 1 and on[b, y] == 1:
                                gain = _transfer_gain(loads, part, hosts, load, replicas, b, y, x, squarings)
                                if gain > best:
                                    kind, best, m1, m2, m3, m4 = 2, gain, b, k, x, -1
            if kind > 0:
                break
        if kind == 0:
            return move
        x = table[m1, m2]
        if kind == 1:
            y = table[m3, m4]
            table[m1, m2], table[m3, m4] = y, x
            on[m1, x] -= 1
            on[m1, y] += 1
            on[m3, y] -= 1
            on[m3, x] += 1
            _rehost(hosts, replicas, x, m1, m3)
            _rehost(hosts, replicas, y, m3, m1)
        else:
            y = m3
            table[m1, m2] = y
            on[m1, x] -= 1
            on[m1, y] += 1
            _rehost(hosts, replicas, x, m1, hosts[x, replicas[x] - 1])
            replicas[x] -= 1
            replicas[y] += 1
            if replicas[y] > hosts.shape[1]:
                hosts, _ = _hosts(table, experts, slots)
            else:
                hosts[y, replicas[y] - 1] = m1
        # Summed afresh: differences would carry rounding along.
        for g in range(ranks):
            if kind == 2 or g in (m1, m3):
                loads[g] = 0.0
                for j in range(places):
                    e = table[g, j]
                    for w in range(load.shape[1]):
                        loads[g, w] += load[e, w] / replicas[e]
                part[g] = _part(loads[g], squarings)
    return most


@compiled
def _next(state: int) -> int:
    """Next state of a linear congruential generator modulo 2 ** 31 (Park and Miller's multiplier)."""
    return (state * 48271) % 2147483647


@compiled
def _kick(table: IntArray, replicas: IntArray, experts: int, transfers: bool, state: int) -> int:
    """One random move in place: a transfer when replica counts may change, a swap otherwise; returns the state."""
    ranks, places = table.shape
    for _ in range(20):
        state = _next(state)
        a = state % ranks
        state = _next(state)
        j = state % places
        x = table[a, j]
        if transfers and x < experts and replicas[x] > 1:
            state = _next(state)
            y = state % experts
            if not (table[a] == y).any():
                table[a, j] = y
                replicas[x] -= 1
                replicas[y] += 1
                return state
            continue
        state = _next(state)
        b = state % ranks
        state = _next(state)
        k = state % places
        y = table[b, k]
        if a != b and x != y and not (table[a] == y).any() and not (table[b] == x).any():
            table[a, j], table[b, k] = y, x
            return state
    return state


@compiled
def iterate(
    table: IntArray,
    replicas: IntArray,
    load: FloatArray,
    squarings: int,
    transfers: bool,
    kicks: int,
    enough: float,
    seed: int,
) -> float:
    """Search, then search again from slightly disturbed copies of the best layout; in place.

    Args:
        table: as in `search`.
        replicas: as in `search`.
        load: as in `search`.
        squarings: as in `search`.
        transfers: as in `search`.
        kicks: disturbed copies to try.
        enough: stop when the objective is no more than this.
        seed: at least 1.

    Returns:
        The objective of the layout: mean over windows of the busiest rank's load.
    """
    experts = load.shape[0] - 1
    search(table, replicas, load, squarings, transfers, 100_000, enough)
    best = objective(window_loads(table, load, replicas))
    state = seed % 2147483646 + 1
    for i in range(kicks):
        if best <= enough:
            break
        t, r = table.copy(), replicas.copy()
        for _ in range(1 + i % 4):
            state = _kick(t, r, experts, transfers, state)
        search(t, r, load, squarings, transfers, 100_000, enough)
        now = objective(window_loads(t, load, r))
        if now < best * (1 - 1e-9):
            best = now
            table[:] = t
            replicas[:] = r
    return best
