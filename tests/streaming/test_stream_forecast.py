import math

import numpy as np
import pytest
from streaming_cases import regimes

from equipoise.errors import InputError
from equipoise.streaming.forecast import Forecaster, shares
from equipoise.streaming.options import AdaptiveOptions


def told(parts, **options):
    forecaster = Forecaster(2, AdaptiveOptions(**options))
    for window in parts:
        forecaster.observe(window)
    return forecaster


def test_a_power_mean_of_decayed_windows_as_the_formula_has_it():
    parts = regimes([0, 1], windows=2, parts=1)
    found = told(parts, memory=(0.5,), powers=(3.0,), blend_power=3.0, recall=False).blend()
    weight = 0.5 ** np.arange(len(parts))[::-1]
    wanted = (np.einsum("n,nle->le", weight, shares(parts[:, 0]) ** 3) / weight.sum()) ** (1 / 3)
    assert found == pytest.approx(wanted)


def test_memory_one_and_power_one_is_the_mean_of_all_parts():
    parts = regimes([0, 1, 2], windows=2, parts=4)
    found = told(parts, memory=(1.0,), powers=(1.0,), blend_power=1.0, recall=False).blend()
    assert found == pytest.approx(shares(parts).mean((0, 1)))


def test_a_short_memory_follows_the_last_part_of_a_window():
    parts = regimes([0, 1], windows=1, parts=4).reshape(1, 8, 2, 8)  # the regime changes within the window
    found = told(parts, memory=(1e-6,), powers=(1.0,), blend_power=1.0, recall=False).blend()
    assert (found.argmax(1) == 3).all()


def test_weight_is_with_long_memories_in_a_steady_stream_and_with_short_ones_after_a_change():
    forecaster = Forecaster(2, AdaptiveOptions(memory=(1e-6, 1.0), powers=(1.0,), recall=False, drift=math.inf))
    weights = []
    size = {"tokens": 6, "experts": 12, "layers": 8}
    for window in np.concatenate([regimes([0], windows=20, **size), regimes([1], windows=3, **size)]):
        forecaster.observe(window)
        weights.append(forecaster.weights[0].mean())
    assert np.mean(weights[10:20]) < 0.1
    assert weights[-1] > 0.9


def test_recall_knows_what_follows_a_moment_that_came_back():
    # A B A B ...: after A comes B, so the last window is the worst forecast of all.
    parts = regimes([0, 1] * 10, windows=1)[:-1]  # ends on A
    found = told(parts, memory=(0.05, 0.06, 1.0), powers=(1.0,), blend_power=1.0)
    assert (found.each[0].argmax(1) == 0).all()
    assert (found.each[-1].argmax(1) == 3).all()
    assert (found.blend().argmax(1) == 3).all()


def test_a_layer_without_load_keeps_what_it_knew():
    parts = regimes([0], windows=4)
    silent = parts.copy()
    silent[2:, :, 1] = 0
    found, wanted = told(silent, recall=False), told(parts[:2], recall=False)
    assert found.each[:, 1] == pytest.approx(wanted.each[:, 1])
    assert np.isfinite(found.blend()).all()


def test_nothing_observed_nothing_forecast():
    with pytest.raises(RuntimeError, match="nothing was observed"):
        Forecaster(1, AdaptiveOptions()).blend()


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"memory": ()}, "memory"),
        ({"memory": (0.0,)}, "memory"),
        ({"powers": (0.5,)}, "powers"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"forget": 0.0}, "forget"),
        ({"drift": 0.0}, "drift"),
        ({"restart": 0.0}, "restart"),
        ({"shared": 2.0}, "shared"),
        ({"recall_windows": 1}, "recall_windows"),
        ({"move_price": -1.0}, "move_price"),
        ({"follow_share": float("inf")}, "follow_share"),
        ({"move_bytes": -1}, "move_bytes"),
    ],
)
def test_options_that_cannot_be_are_refused(bad, word):
    with pytest.raises(InputError, match=word):
        AdaptiveOptions(**bad)


def test_after_a_change_of_regime_the_old_one_is_outweighed_at_once():
    parts = np.concatenate([regimes([0], windows=12), regimes([1], windows=1)])
    options = {"memory": (1.0,), "powers": (1.0,), "recall": False}
    restarted, never = told(parts, **options), told(parts, drift=float("inf"), **options)
    assert (restarted.blend().argmax(1) == 3).all()
    assert (never.blend().argmax(1) == 0).all()


def test_a_steady_stream_is_never_taken_for_a_change():
    parts = regimes([0], windows=40, tokens=200)
    options = {"memory": (0.4, 1.0), "powers": (2.0,), "recall": False}
    assert np.array_equal(told(parts, **options).each, told(parts, drift=float("inf"), **options).each)
