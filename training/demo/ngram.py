"""Interpolated modified Kneser-Ney n-gram model in numpy: the baseline a neural language model has to beat.

Formula (Chen & Goodman 1999, "An empirical study of smoothing techniques for language modeling", section 3):

    P_n(w | h) = max(c(hw) - D(c(hw)), 0) / c(h.) + g(h) P_{n-1}(w | h'),   h' = h without its first token
    g(h) = (D1 N1(h.) + D2 N2(h.) + D3 N3+(h.)) / c(h.),                    P_0 = 1 / V

with c the number of occurrences at the highest order and the number of distinct left neighbours below it, N1, N2
and N3+ the number of words that follow h once, twice, more often, and D1..D3+ estimated an order from counts of
counts. A context that was never seen passes all its mass down.

An n-gram is one int64 key (12 bits a token for a vocabulary of 4096), so every table is a sorted array and every
look-up a binary search. Cost: 20 million tokens, order 5: about a minute and 2.5 GB.

    python training/demo/ngram.py        self-check: sums to one, and equals a dictionary version
"""

import collections
import json
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """Tables of one order n: keys [K] sorted n-grams, contexts [C] sorted (n-1)-grams."""

    keys: np.ndarray  # [K] int64
    numerators: np.ndarray  # [K] float32, c - D(c)
    contexts: np.ndarray  # [C] int64
    totals: np.ndarray  # [C] float64, c(h.)
    backoff: np.ndarray  # [C] float64, mass D1 N1 + D2 N2 + D3 N3+ (not yet divided)


def discounts(counts: np.ndarray) -> np.ndarray:
    """Discount by count 0, 1, 2, 3+: counts [K] -> [4]; falls back to 0.5 where counts of counts are empty."""
    n = np.array([np.count_nonzero(counts == i) for i in range(1, 5)], dtype=np.float64)
    if (n == 0).any():
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n[0] / (n[0] + 2 * n[1])
    raw = [i - (i + 1) * y * n[i] / n[i - 1] for i in (1, 2, 3)]
    return np.array([0.0, *np.clip(raw, 0.01, [0.99, 1.99, 2.99])])


def build_order(keys: np.ndarray, counts: np.ndarray, bits: int) -> Order:
    """Tables from sorted distinct n-grams keys [K] and their counts [K]."""
    d = discounts(counts)[np.minimum(counts, 3)]
    prefix = keys >> bits
    first = np.flatnonzero(np.r_[True, prefix[1:] != prefix[:-1]])
    return Order(
        keys,
        (counts - d).astype(np.float32),
        prefix[first],
        np.add.reduceat(counts.astype(np.float64), first),
        np.add.reduceat(d, first),
    )


def ngram_keys(stream: np.ndarray, order: int, bits: int) -> np.ndarray:
    """Key of the n-gram that ends at each position from order - 1 on: stream [n] -> [n - order + 1] int64."""
    keys = np.zeros(len(stream) - order + 1, dtype=np.int64)
    for i in range(order):
        keys = (keys << bits) | stream[i : len(stream) - order + 1 + i].astype(np.int64)
    return keys


def find(table: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position of each query in a sorted table, and whether it is there: [q] int64, [q] bool."""
    at = np.minimum(np.searchsorted(table, queries), len(table) - 1)
    return at, table[at] == queries


class KneserNey:
    """The model; `streams` are token arrays whose n-grams never cross from one stream to the next."""

    def __init__(self, streams: list[np.ndarray], vocab: int, order: int = 5) -> None:
        self.vocab, self.order, self.bits = vocab, order, (vocab - 1).bit_length()
        if order * self.bits > 62:
            raise ValueError(f"order {order} with {self.bits} bits a token does not fit an int64 key")
        self.orders: dict[int, Order] = {}
        keys, counts = np.unique(np.concatenate([ngram_keys(s, order, self.bits) for s in streams]), return_counts=True)
        for n in range(order, 0, -1):
            self.orders[n] = build_order(keys, counts, self.bits)
            if n > 1:  # distinct left neighbours of each shorter n-gram
                keys, counts = np.unique(keys & ((1 << self.bits * (n - 1)) - 1), return_counts=True)

    def probabilities(self, keys: np.ndarray, longest: int) -> np.ndarray:
        """Probability of the last token of each n-gram given the others: keys [q] of order `longest` -> [q]."""
        result = np.full(len(keys), 1.0 / self.vocab)
        for n in range(1, longest + 1):
            table, key = self.orders[n], keys & ((1 << self.bits * n) - 1)
            at, seen = find(table.keys, key)
            context, known = find(table.contexts, key >> self.bits)
            higher = np.where(seen, table.numerators[at], 0.0) + table.backoff[context] * result
            result = np.where(known, higher / table.totals[context], result)
        return result

    def score(self, stream: np.ndarray, chunk: int = 500_000) -> np.ndarray:
        """Log-probability (nats) of each token but the first, given up to order - 1 before it: [n] -> [n - 1]."""
        parts = [np.log(self.probabilities(ngram_keys(stream[:n], n, self.bits), n)) for n in range(2, self.order)]
        keys = ngram_keys(stream, self.order, self.bits)
        parts += [np.log(self.probabilities(keys[i : i + chunk], self.order)) for i in range(0, len(keys), chunk)]
        return np.concatenate(parts)


def _reference(stream: list[int], vocab: int, order: int, gram: tuple[int, ...]) -> float:
    """The same formula with dictionaries, for one n-gram, slowly."""
    counts = collections.Counter(tuple(stream[i : i + order]) for i in range(len(stream) - order + 1))
    levels = [counts]
    for _ in range(order - 1):
        levels.insert(0, collections.Counter(key[1:] for key in levels[0]))
    result = 1.0 / vocab
    for n in range(1, len(gram) + 1):
        level, h = levels[n - 1], gram[len(gram) - n : -1]
        d = discounts(np.array(list(level.values())))
        followers = {key[-1]: c for key, c in level.items() if key[:-1] == h}
        if followers:
            c = followers.get(gram[-1], 0)
            spread = sum(d[min(c, 3)] for c in followers.values())
            result = (c - d[min(c, 3)] + spread * result) / sum(followers.values())
    return result


def self_check(vocab: int = 23, length: int = 4000, order: int = 5) -> dict[str, float]:
    """Largest deviation from a sum of one over seen and unseen contexts, and from the dictionary version."""
    rng = np.random.default_rng(0)
    table = rng.dirichlet(np.full(vocab, 0.1), size=vocab)
    stream = [0]
    for _ in range(length):
        stream.append(int(rng.choice(vocab, p=table[stream[-1]])))
    model = KneserNey([np.array(stream)], vocab, order)
    worst_sum = worst_reference = 0.0
    for trial in range(300):
        start = rng.integers(0, length - order)
        context = stream[start : start + order - 1] if trial % 2 else list(rng.integers(0, vocab, order - 1))
        grams = np.array([[*context, w] for w in range(vocab)])
        keys = ngram_keys(grams.reshape(-1), order, model.bits)[::order]
        p = model.probabilities(keys, order)
        worst_sum = max(worst_sum, abs(p.sum() - 1.0))
        if trial < 20:
            expected = _reference(stream, vocab, order, tuple(int(t) for t in grams[trial % vocab]))
            worst_reference = max(worst_reference, abs(p[trial % vocab] / expected - 1.0))
    assert max(worst_sum, worst_reference) < 1e-6, (worst_sum, worst_reference)
    return {"worst_sum_error": worst_sum, "worst_relative_error": worst_reference}


if __name__ == "__main__":
    print(json.dumps(self_check()))
