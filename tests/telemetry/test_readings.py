"""Telemetry as a dict: figures against a count by hand, and None for what is not there."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import equipoise as eq
from core_models import batch
from equipoise.models import find_layers
from equipoise.profiling import watch
from equipoise.rerouting import installed
from equipoise.rerouting.selection import Rule
from equipoise.rerouting.thresholds import Thresholds
from families.families_support import own_model
from runtime.balancer_cases import SPARE, balanced, logits, skewed
from tiny import EXPERTS


def loose(model) -> Thresholds:
    """Rules by which tokens do leave their top-k."""
    return Thresholds.of(model, Rule(gap=0.9, mass=1.0))


def test_figures_of_a_window_are_those_of_a_count_by_hand():
    model = balanced()
    with eq.Telemetry(model, window=84) as telemetry, watch(model) as load:
        empty = telemetry.read()
        assert (empty["lis"], empty["windows"], empty["tokens"]) == (None, 0, 0)
        logits(model)
        assert telemetry.read()["tokens"] == 42  # 48 places, 6 of them padding
        assert telemetry.read()["lis"] is None  # not a window yet
        logits(model, 1)
        reading = telemetry.read()
    assert (reading["tokens"], reading["windows"], reading["window"]) == (84, 1, 84)
    lis, plain, imbalance = [], [], []
    for counts, slots in zip(load.counts, load.slot_counts, strict=True):
        assert counts.sum() == slots.sum() == 84 * 2
        lis.append(EXPERTS * slots.max() / (84 * 2))
        plain.append(EXPERTS * counts.max() / (84 * 2))
        imbalance.append(slots.max() / (84 * 2 / (EXPERTS + SPARE)))
    assert reading["lis"] == pytest.approx(np.mean(lis))
    assert reading["lis_without_replicas"] == pytest.approx(np.mean(plain))
    assert reading["slot_imbalance"] == pytest.approx(np.mean(imbalance))
    assert list(reading["layers"]) == [str(layer.layer_id) for layer in find_layers(model)]
    assert [values["lis"] for values in reading["layers"].values()] == pytest.approx(lis)
    assert {reading[key] for key in ("moves", "moved_bytes", "balancer_seconds", "rerouted", "failures")} == {None}
    json.dumps(reading, allow_nan=False)


def test_forwards_in_inference_mode_and_outside_of_it_count_alike():
    model = own_model("mixtral")
    with eq.Telemetry(model, window=42) as telemetry:
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with mode():
                model(**batch())
        assert telemetry.read()["tokens"] == 3 * 42
        assert telemetry.read()["windows"] == 3


def test_only_the_latest_window_is_measured():
    model = own_model("mixtral")
    with eq.Telemetry(model, window=42) as telemetry:
        logits(model)
        first = telemetry.read()["lis"]
        with watch(model) as load:
            logits(model, 5)
        second = telemetry.read()
        assert second["windows"] == 2
        assert second["lis"] == pytest.approx(float(eq.lis(load.counts).mean())) != first
    logits(model)
    assert telemetry.read() == second  # closed: the last reading stays


def test_the_balancer_counts_what_it_did():
    model = balanced("int8")
    with eq.StreamingBalancer(model, "short", window=42) as balancer, eq.Telemetry(model, balancer=balancer) as all_of:
        balancer.observe(skewed(model, 7))
        size = eq.runtime.slot_bytes(find_layers(model)[0].layout, "int8")
        reading = balancer.telemetry()
        moves = SPARE * len(find_layers(model))
        assert (reading["moves"], reading["moved_bytes"], reading["steps"]) == (moves, moves * size, 1)
        assert [values["moves"] for values in reading["layers"].values()] == [SPARE] * len(find_layers(model))
        assert reading["balancer_seconds"] > 0
        assert (reading["failures"], reading["missed_windows"]) == (0, 0)
        assert reading["lis"] is None  # no forward yet
        logits(model)
        assert all_of.read() == balancer.telemetry()
        assert all_of.read()["windows"] == 1


def test_a_window_that_ends_during_a_step_is_missed_and_counted():
    model = balanced()
    with eq.StreamingBalancer(model, "short", window=42) as balancer:
        with balancer._stepping:
            logits(model)
        assert balancer.telemetry()["missed_windows"] == 1
        assert balancer.telemetry()["steps"] == 0
        assert balancer.telemetry()["windows"] == 1  # its load is measured all the same
        logits(model)
        assert balancer.telemetry()["steps"] == 1


def test_rerouted_tokens_are_lasers():
    model = own_model("mixtral")
    with installed(model, loose(model)) as routing, eq.Telemetry(model, laser=routing) as telemetry:
        assert (telemetry.read()["rerouted"], telemetry.read()["laser_decisions"]) == (0, 0)
        logits(model)
        reading = telemetry.read()
    layers = len(find_layers(model))
    assert reading["laser_decisions"] == 42 * layers
    assert reading["rerouted"] == routing.rerouted.sum() > 0
    assert [values["rerouted"] for values in reading["layers"].values()] == routing.rerouted.tolist()


@torch.no_grad()
def test_a_layer_that_no_token_reached_is_none_and_not_in_the_mean():
    """A decoder step of an encoder-decoder passes no layer of the encoder."""
    model = own_model("switch_transformers")
    inputs = batch()
    encoded = model.get_encoder()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    with eq.Telemetry(model, window=1) as telemetry:
        model(encoder_outputs=encoded, attention_mask=inputs["attention_mask"], decoder_input_ids=inputs["input_ids"])
        reading = telemetry.read()
    assert (reading["windows"], reading["tokens"]) == (1, 48)
    heard = [values["lis"] for values in reading["layers"].values() if values["lis"] is not None]
    assert 0 < len(heard) < len(reading["layers"])
    assert reading["lis"] == pytest.approx(np.mean(heard))


def test_what_contradicts_is_refused():
    model, other = balanced(), balanced()
    balancer = eq.StreamingBalancer(model, window=64)
    with pytest.raises(eq.InputError, match="another model"):
        eq.Telemetry(other, balancer=balancer)
    with pytest.raises(eq.InputError, match="contradicts"):
        eq.Telemetry(model, balancer=balancer, window=32)
    for window in (0, True, 1.5):
        with pytest.raises(eq.InputError, match="at least 1"):
            eq.Telemetry(model, window=window)
