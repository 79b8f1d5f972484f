from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from equipoise import metrics as measures
from equipoise.reporting.figures import activation_gap, busiest_slot, figures_of, rank_correlation
from equipoise.reporting.run_directory import layer_labels, load_run
from equipoise.types import LayerPlan, Slot

COUNTS = hnp.arrays(
    np.int64, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9), elements=st.integers(0, 999)
)


@given(COUNTS)
def test_gaps_add_up_to_the_distance_from_busiest_to_idlest(counts: np.ndarray) -> None:
    total = counts.sum(1)
    gaps = activation_gap(counts, total)
    assert gaps.shape == (counts.shape[0], counts.shape[1] - 1)
    assert (gaps >= 0).all()
    assert not np.signbit(gaps).any()
    spread = np.where(total > 0, np.ptp(counts, axis=1) / np.maximum(total, 1), 0)
    np.testing.assert_allclose(gaps.sum(1), spread, atol=1e-12)


def test_gap_of_known_loads() -> None:
    np.testing.assert_allclose(activation_gap([[10, 40, 30, 20]], [100]), [[0.1, 0.1, 0.1]])
    np.testing.assert_allclose(activation_gap([[5, 90, 5]], [100]), [[0.85, 0.0]])
    np.testing.assert_allclose(activation_gap([[0, 0]], [0]), [[0.0]])


def test_rank_correlation_of_known_orders() -> None:
    rho = rank_correlation([[1, 2, 3], [1, 2, 3], [1, 2, 3], [5, 5, 5]], [[1, 4, 9], [3, 2, 1], [1, 3, 2], [1, 2, 3]])
    np.testing.assert_allclose(rho, [1.0, -1.0, 0.5, np.nan])


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1000)), min_size=1, max_size=20))
def test_busiest_slot_is_the_largest_of_the_experts_slots(extra: list[tuple[int, int]]) -> None:
    slots = sorted([(e, 7) for e in range(5)] + extra, key=lambda item: item[0])
    layer = LayerPlan(0, "", 5, tuple(Slot(e, "original", 0, 0.5) for e, _ in slots))
    found = busiest_slot(np.array([n for _, n in slots]), layer)
    assert found.tolist() == [max(n for e, n in slots if e == expert) for expert in range(5)]


def test_the_largest_value_of_a_heat_map_row_is_the_layers_lis(small_run: Path) -> None:
    run = load_run(small_run)
    figures = figures_of(run)
    np.testing.assert_allclose(figures.before.max(1), [layer.lis_before for layer in run.metrics.layers])
    np.testing.assert_allclose(figures.after.max(1), [layer.lis_after for layer in run.metrics.layers])
    np.testing.assert_allclose(figures.before.mean(1), 1)
    np.testing.assert_allclose(figures.lis_before_in_sample, measures.lis(run.profile.counts))


def test_slot_and_rank_imbalance_are_over_slots_and_ranks(small_run: Path) -> None:
    run = load_run(small_run)
    figures = figures_of(run)
    assert figures.rank_imbalance is not None
    for row, layer in enumerate(run.plan.layers):
        tokens = np.array(run.metrics.heldout_slots[row], dtype=float)
        assert figures.slot_imbalance[row] == pytest.approx(tokens.max() / tokens.mean())
        ranks = [sum(t for t, s in zip(tokens, layer.slots, strict=True) if s.rank == g) for g in range(4)]
        assert figures.rank_imbalance[row] == pytest.approx(max(ranks) / (sum(ranks) / 4))
    # the three measures answer different questions, and differ
    assert not np.allclose(figures.slot_imbalance, figures.lis_after)
    assert not np.allclose(figures.rank_imbalance, figures.slot_imbalance)
    one = figures_of(dataclasses.replace(run, plan=dataclasses.replace(run.plan, ranks=1)))
    assert one.rank_imbalance is None


@pytest.mark.parametrize(
    ("numbers", "names", "labels"),
    [
        ([3, 5], ["a.3.x", "a.5.x"], ["3", "5"]),
        ([1, 1, 3], ["encoder.block.1.mlp", "decoder.block.1.mlp", "decoder.block.3.mlp"],
         ["encoder 1", "decoder 1", "decoder 3"]),
        ([1, 1], ["model.encoder.1.mlp", "model.decoder.1.mlp"], ["encoder 1", "decoder 1"]),
        ([1, 1], ["", ""], ["1 (0)", "1 (1)"]),
    ],
)  # fmt: skip
def test_layers_get_names_that_tell_them_apart(numbers: list[int], names: list[str], labels: list[str]) -> None:
    assert layer_labels(numbers, names) == labels
