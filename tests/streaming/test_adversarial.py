"""The adversarial choice of sequences: a case by hand, and what holds for all."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from equipoise.errors import InputError
from equipoise.streaming import adversarial_stream, choose_adversarial, replay


def test_a_case_by_hand():
    # Two layers of two experts; expert 1 is layer 0's heavy hitter, expert 0 layer 1's (9 against 5, 8 against 6).
    counts = np.array(
        [
            [[2, 2], [2, 2]],  # hit 1/2
            [[0, 4], [4, 0]],  # hit 1
            [[3, 1], [0, 4]],  # hit 1/8
            [[0, 2], [2, 0]],  # hit 1: half as long, hits as much
            [[0, 0], [0, 0]],  # reached no expert
        ]
    )
    chosen = choose_adversarial(counts, keep=0.6, steps=3)
    assert chosen.heavy.tolist() == [1, 0]
    assert chosen.hit.tolist() == [0.5, 1.0, 0.125, 1.0, 0.0]
    assert [step.tolist() for step in chosen.steps] == [[0], [1], [3]]  # in the order of the text, not of the hit
    stream = adversarial_stream(counts, chosen, np.full((2, 2), 7))
    assert stream.parts.shape == (3, 1, 2, 2)
    assert np.array_equal(stream.windows, counts[[0, 1, 3]])
    assert stream.slot_bytes is not None
    # A layer that a sequence did not reach says nothing about it.
    counts[1, 1] = 0
    assert choose_adversarial(counts, keep=0.6, steps=3).hit[1] == 1.0


@settings(deadline=None)
@given(
    counts=hnp.arrays(
        np.int64,
        st.tuples(st.integers(10, 40), st.integers(1, 3), st.integers(1, 5)),
        elements=st.integers(0, 50),
    ),
    keep=st.floats(0.01, 1.0),
)
def test_what_holds_for_all(counts, keep):
    chosen = choose_adversarial(counts, keep)
    kept = chosen.kept
    assert len(chosen.steps) == 10
    assert len(kept) == max(10, round(keep * len(counts)))
    assert (np.diff(kept) > 0).all()
    sizes = [len(step) for step in chosen.steps]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    left = np.setdiff1d(np.arange(len(counts)), kept)
    if len(left):
        assert chosen.hit[kept].min() >= chosen.hit[left].max()
    assert ((chosen.hit >= 0) & (chosen.hit <= 1 + 1e-12)).all()
    stream = adversarial_stream(counts, chosen)
    assert np.array_equal(stream.parts.sum((0, 1)), counts[kept].sum(0))
    assert len(list(replay(stream.parts, 1))) == 9


def test_kept_sequences_are_less_balanced_than_the_rest():
    """On random text with heads of its own, what is kept hits the heavy hitters more than the text as a whole."""
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(16, 0.3), (400, 4))
    counts = np.array([[rng.multinomial(200, p) for p in layers] for layers in share])
    chosen = choose_adversarial(counts)
    heavy = np.take_along_axis(counts, chosen.heavy[None, :, None], -1)[..., 0]
    assert heavy[chosen.kept].sum() / counts[chosen.kept].sum() > 2 * heavy.sum() / counts.sum()


@pytest.mark.parametrize(
    ("counts", "options", "word"),
    [
        (np.ones((9, 2, 4), dtype=int), {}, "9 sequences"),
        (np.ones((20, 4), dtype=int), {}, "[sequences, layers, experts]"),
        (np.ones((20, 2, 4)), {}, "whole numbers"),
        (np.full((20, 2, 4), -1), {}, "from 0"),
        (np.ones((20, 0, 4), dtype=int), {}, "[sequences, layers, experts]"),
        (np.ones((20, 2, 4), dtype=int), {"keep": 0.0}, "keep"),
        (np.ones((20, 2, 4), dtype=int), {"keep": float("nan")}, "keep"),
        (np.ones((20, 2, 4), dtype=int), {"steps": 2}, "at least 3 steps"),
    ],
)
def test_wrong_counts_are_refused(counts, options, word):
    with pytest.raises(InputError) as refusal:
        choose_adversarial(counts, **options)
    assert word in str(refusal.value)
