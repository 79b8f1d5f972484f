"""Streams with a known answer."""

import numpy as np


def regimes(order, windows=6, parts=4, layers=2, experts=8, tokens=400, seed=0):
    """A stream that goes through regimes, each with its own busy experts: [N, parts, L, E]."""
    rng = np.random.default_rng(seed)
    out = []
    for regime in order:
        for _ in range(windows):
            load = np.ones((layers, experts))
            load[:, (3 * regime) % experts] = 12
            load[:, (3 * regime + 1) % experts] = 6
            p = load / load.sum(1, keepdims=True)
            out.append([[rng.multinomial(tokens, row) for row in p] for _ in range(parts)])
    return np.array(out, dtype=np.float64)
