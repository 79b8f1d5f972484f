"""One option a layer, bytes within a limit, the sum of values as small as possible: exact, or nearly.

A multiple-choice knapsack, solved in three steps:

1. A price a byte (Lagrange multiplier) is found by bisection; at that price every layer chooses for itself
   (`layer_options.scan`). That gives a lower bound, and on the dear side of the price a feasible choice.
2. Only options whose priced value is within `gap` of their layer's best can be in a solution that is better than
   bound + gap. They are enumerated for a small gap first.
3. Dynamic programming over layers keeps the Pareto front of (bytes, value). If its best solution is within the
   gap of the bound it is the optimum; if not, the gap is doubled.

When a front grows beyond `STATES` it is thinned to evenly spaced members: the result is still feasible, and the
distance to the bound (returned) says what it may have cost. With many layers the bound itself is tight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from equipoise.planning.layer_options import scan
from equipoise.types import FloatArray, IntArray

STATES = 20_000
"""Members of a Pareto front kept with up to 8 layers; with more, `STATES_OF_MANY`."""

STATES_OF_MANY = 512

_NONE = np.empty(0, dtype=np.int64)
_NO_VALUE = np.empty(0, dtype=np.float64)


@dataclass(frozen=True)
class LayerProblem:
    """Inputs of one layer to `layer_options.scan`; see there for the meaning of each."""

    order: IntArray
    lis: FloatArray
    allowed: np.ndarray
    cost: FloatArray
    most_low: int
    original: int
    saved: int
    slot_price: float

    def best(self, byte_price: float) -> tuple[int, int, float]:
        """Replicas, low slots and priced value of the best option at a price a byte."""
        _, spare, units, priced = self._scan(byte_price, -np.inf, _NONE, _NONE, _NO_VALUE)
        return spare, units, priced

    def options(self, byte_price: float, within: float) -> tuple[IntArray, IntArray, FloatArray, IntArray]:
        """Replicas, low slots, value and bytes of every option with priced value at most `within`."""
        room = 1024
        while True:
            spare, units = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int64)
            value = np.empty(room, dtype=np.float64)
            found = self._scan(byte_price, within, spare, units, value)[0]
            if found <= room:
                break
            room = found
        spare, units, value = spare[:found], units[:found], value[:found]
        return spare, units, value, (len(self.cost) + spare) * self.original - units * self.saved

    def bytes(self, spare: int, units: int) -> int:
        """Bytes of an option."""
        return (len(self.cost) + spare) * self.original - units * self.saved

    def _scan(
        self, byte_price: float, within: float, spare: IntArray, units: IntArray, value: FloatArray
    ) -> tuple[int, int, int, float]:
        return scan(
            self.order, self.lis, self.allowed, self.cost, self.most_low, self.original, self.saved,
            self.slot_price, byte_price, within, spare, units, value,
        )  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A feasible choice.

    Attributes:
        spare: int64 [L] replicas of each layer.
        units: int64 [L] low slots of each layer.
        value: sum of the layers' values.
        bound: no feasible choice has a smaller sum than this.
    """

    spare: IntArray
    units: IntArray
    value: float
    bound: float


def choose(layers: Sequence[LayerProblem], limit: int) -> Choice | None:
    """Solve; None when even the smallest choice is over the limit.

    Args:
        layers: at least one.
        limit: bytes of all layers together.
    """
    price, dear = _price(layers, limit)
    if dear is None:
        return None
    best = [layer.best(price) for layer in layers]
    bound = sum(b[2] for b in best) - price * limit
    value, spare, units = dear
    if price == 0.0:
        return Choice(spare, units, value, value)
    widest = max(value - bound, 0.0) + 1e-12
    gap = widest / 32
    while True:
        better, cut = _front(layers, [b[2] for b in best], price, gap, limit)
        if better is not None and better[0] < value:
            value, spare, units = better
        if value <= bound + gap or gap >= widest or (cut and better is not None):
            # Everything that could be better was looked at, unless a front was cut.
            return Choice(spare, units, value, min(bound, value) if cut else value)
        gap *= 2


def _price(layers: Sequence[LayerProblem], limit: int) -> tuple[float, tuple[float, IntArray, IntArray] | None]:
    """The smallest price at which what the layers choose fits, to a relative 2^-40, and that choice."""

    def at(price: float) -> tuple[int, tuple[float, IntArray, IntArray]]:
        chosen = [layer.best(price) for layer in layers]
        spare = np.array([c[0] for c in chosen], dtype=np.int64)
        units = np.array([c[1] for c in chosen], dtype=np.int64)
        size = [x.bytes(int(s), int(u)) for x, s, u in zip(layers, spare, units, strict=True)]
        value = sum(c[2] - price * b for c, b in zip(chosen, size, strict=True))
        return sum(size), (value, spare, units)

    size, choice = at(0.0)
    if size <= limit:
        return 0.0, choice
    low, high = 0.0, 1.0 / max(1, max(layer.original for layer in layers))
    for _ in range(80):
        size, choice = at(high)
        if size <= limit:
            break
        low, high = high, high * 4
    else:
        return high, None
    for _ in range(48):
        if high - low <= high * 1e-9:
            break
        middle = (low + high) / 2
        size, at_middle = at(middle)
        if size <= limit:
            high, choice = middle, at_middle
        else:
            low = middle
    return high, choice


def _front(
    layers: Sequence[LayerProblem], best: Sequence[float], price: float, gap: float, limit: int
) -> tuple[tuple[float, IntArray, IntArray] | None, bool]:
    """Best choice among options within `gap` of their layer's best; and whether a front had to be thinned."""
    many = len(layers) > 8
    keep = STATES_OF_MANY if many else STATES
    # A hair more than the gap, so that each layer's own best is never lost to rounding.
    options = [x.options(price, b + gap + 1e-12 * (1 + abs(b))) for x, b in zip(layers, best, strict=True)]
    least = np.cumsum([int(o[3].min()) for o in options][::-1])[::-1]
    size, value, slack = np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1)
    trail: list[tuple[IntArray, IntArray]] = []
    cut = False
    for l, (_, _, gain, weight) in enumerate(options):  # noqa: E741
        members = _pareto(weight, gain)
        if many and len(members) > 32:
            members = members[np.argsort((gain + price * weight)[members], kind="stable")[:32]]
            cut = True
        total = (size[:, None] + weight[members]).ravel()
        worth = (value[:, None] + gain[members]).ravel()
        off = (slack[:, None] + (gain[members] + price * weight[members] - best[l])).ravel()
        rest = int(least[l + 1]) if l + 1 < len(options) else 0
        alive = np.flatnonzero((total <= limit - rest) & (off <= gap * (1 + 1e-9) + 1e-12))
        alive = alive[_pareto(total[alive], worth[alive])]
        if len(alive) > keep:
            alive = alive[np.linspace(0, len(alive) - 1, keep).round().astype(np.int64)]
            cut = True
        if not len(alive):
            return None, cut
        trail.append((alive // len(members), members[alive % len(members)]))
        size, value, slack = total[alive], worth[alive], off[alive]
    at = int(value.argmin())
    total_value = float(value[at])
    spare, units = np.zeros(len(layers), dtype=np.int64), np.zeros(len(layers), dtype=np.int64)
    for l in range(len(layers) - 1, -1, -1):  # noqa: E741
        parent, member = trail[l]
        spare[l], units[l] = options[l][0][member[at]], options[l][1][member[at]]
        at = int(parent[at])
    return (total_value, spare, units), cut


def _pareto(size: IntArray, value: FloatArray) -> IntArray:
    """Indices, by rising size, of the members that no other is both smaller and better than."""
    order = np.lexsort((value, size))
    v = value[order]
    lowest = np.minimum.accumulate(v)
    keep = np.ones(len(v), dtype=bool)
    keep[1:] = v[1:] < lowest[:-1]
    return order[keep]
