"""`eq.laser` and calibration on whole models: plans, padding, generation, files, threads, wrong input."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import equipoise as eq
from core_models import batch
from equipoise.errors import InputError
from equipoise.models import find_layers
from equipoise.rerouting import Rule, Thresholds, calibrate, installed
from equipoise.rerouting.install import slot_divisor
from equipoise.runtime.install import fill_layer
from equipoise.runtime.slots import SlotTable
from equipoise.types import LayerPlan, Slot
from tiny import EXPERTS, FAMILIES

FREE = Rule(gap=1, extra=6)


@torch.no_grad()
def run(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    return model(**(inputs or batch(6, 16))).logits


def batches(count: int = 4, rows: int = 3) -> list[dict[str, torch.Tensor]]:
    return [batch(rows, 24, seed=i) for i in range(count)]


def test_padding_neither_counts_nor_moves_nor_matters():
    model = FAMILIES["mixtral"]()
    plain = batch(1, 16)
    ids = torch.cat([plain["input_ids"], torch.full((1, 9), 7)], 1)
    mask = torch.cat([plain["attention_mask"], torch.zeros(1, 9, dtype=torch.int64)], 1)
    thresholds = Thresholds.of(model, FREE)
    with installed(model, thresholds, window=0) as short, eq.watch(model) as load:
        wanted = run(model, **plain)
    with installed(model, thresholds, window=0) as long, eq.watch(model) as padded:
        got = run(model, input_ids=ids, attention_mask=mask)
    assert short.rerouted.sum() > 0
    assert long.rerouted.tolist() == short.rerouted.tolist()
    assert long.tokens.tolist() == short.tokens.tolist() == [16] * 3
    assert np.array_equal(load.counts, padded.counts)
    torch.testing.assert_close(got[:, :16], wanted, rtol=1e-5, atol=1e-5)


def test_deterministic_and_by_rows():
    model = FAMILIES["qwen3_moe"]()
    inputs = batch(6, 16)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    thresholds = Thresholds.of(model, Rule(gap=0.5))
    outputs = []
    for rows in (torch.arange(6), torch.arange(6), order):
        with installed(model, thresholds):
            outputs.append(run(model, **{key: value[rows] for key, value in inputs.items()}))
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0][order], outputs[2], rtol=1e-4, atol=1e-5)


def test_generation_follows_the_window():
    """One token a step: without a window nothing can be balanced, with one the busy experts are spared."""
    model = FAMILIES["mixtral"]()
    inputs = batch(1, 8)
    lis = {}
    for window in (0, 64):
        with installed(model, Thresholds.of(model, FREE), window=window) as routing, eq.watch(model) as load:
            model.generate(**inputs, max_new_tokens=60, do_sample=False, eos_token_id=[])
        lis[window] = float(eq.lis(load.counts).mean())
        assert routing.tokens[0] >= 60
    assert lis[64] < 0.9 * lis[0]


def test_replicas_are_seen():
    model = FAMILIES["mixtral"]()
    layer = find_layers(model)[0]
    slots = (Slot(0, share=0.75), Slot(0, share=0.25), *(Slot(e) for e in range(1, EXPERTS)))
    fill_layer(layer, LayerPlan(layer.layer_id, layer.name, EXPERTS, slots))
    assert isinstance(layer.experts.equipoise_slots.table, SlotTable)
    # Expert 0's busiest slot takes three quarters of it; the ninth class is no expert.
    assert slot_divisor(find_layers(model)[0], EXPERTS + 1).tolist() == pytest.approx([4 / 3, *[1] * 7, float("inf")])


def test_replicas_that_move_while_it_runs_are_seen():
    model = FAMILIES["mixtral"]()
    texts = batches(2, 6)
    eq.apply(model, eq.plan(eq.profile(model, texts), replicas=1))
    layer = find_layers(model)[0]
    counts = np.bincount([slot.expert for slot in layer.experts.equipoise_slots.table.layer.slots])
    twice, other = int(counts.argmax()), int(counts.argmin())
    assert slot_divisor(layer, EXPERTS).tolist() == counts.tolist()
    with installed(model, Thresholds.of(model, FREE)) as routing:
        run(model, **texts[0])
        # As a live balancer does it: the spare slot now serves another expert.
        table = layer.experts.equipoise_slots.table
        served = [[s for s, slot in enumerate(table.layer.slots) if slot.expert == e] for e in range(EXPERTS)]
        served[other].append(served[twice].pop())
        now = copy.copy(layer.experts.equipoise_slots)
        now.table = table.rerouted(served)
        layer.experts.equipoise_slots = now
        run(model, **texts[0])
        assert routing.layers[0]._slots.tolist() == [len(slots) for slots in served]


def test_with_a_plan_it_beats_the_plan_alone():
    model = FAMILIES["mixtral"]()
    texts = batches(6, 6)
    profile = eq.profile(model, texts[:3])
    eq.apply(model, eq.plan(profile, budget=1.5))
    results = []
    for rule in (Rule(), FREE):
        with installed(model, Thresholds.of(model, rule), window=0), eq.watch(model) as load:
            for inputs in texts[3:]:
                run(model, **inputs)
        results.append(np.mean([float(eq.slot_lis(n, EXPERTS)) for n in load.slot_counts]))
    assert results[1] < results[0]


def test_calibration_holds_its_bound_and_uses_it():
    model = FAMILIES["olmoe"]()
    texts = batches(6, 8)
    small, large = (calibrate(model, texts, max_loss_increase=bound) for bound in (0.0, 0.2))
    assert all(rule.keeps for rule in small.thresholds.rules)
    assert small.increase == 0
    assert large.increase <= 0.2
    assert not all(rule.keeps for rule in large.thresholds.rules)
    with eq.watch(model) as before:
        run(model, **texts[0])
    with eq.laser(model, large.thresholds) as routing, eq.watch(model) as after:
        run(model, **texts[0])
    assert routing.rerouted.sum() > 0
    assert eq.lis(after.counts).mean() < eq.lis(before.counts).mean()
    with eq.laser(model, calibration=texts, max_loss_increase=0.2) as routing:
        assert routing.thresholds == large.thresholds


def test_thresholds_travel_with_the_checkpoint(tmp_path: Path):
    model = FAMILIES["mixtral"]()
    model.save_pretrained(tmp_path)
    thresholds = Thresholds.of(model, [Rule(gap=0.1 * i, target=1 + i) for i in range(3)])
    path = eq.save_laser(thresholds, tmp_path)
    assert path.name == "laser.json"
    assert eq.load_laser(tmp_path) == eq.load_laser(path) == thresholds
    again = type(model).from_pretrained(tmp_path)
    with eq.laser(again) as routing:
        run(again)
    assert routing.thresholds == thresholds
    with pytest.raises(InputError, match="no laser thresholds"), eq.laser(model):
        pass


def test_damaged_thresholds_are_refused(tmp_path: Path):
    model = FAMILIES["mixtral"]()
    path = eq.save_laser(Thresholds.of(model, FREE), tmp_path / "t.json")
    good = json.loads(path.read_text())
    for change, word in (({"version": 2}, "version"), ({"more": 1}, "more"), ({"rules": [{"gap": 1}]}, "mass")):
        path.write_text(json.dumps(good | change))
        with pytest.raises(InputError, match=word):
            eq.load_laser(path)
    path.write_text(json.dumps(good | {"rules": good["rules"][:1]}))
    with pytest.raises(InputError, match="1 rules for 3 layers"):
        eq.load_laser(path)
    path.write_text(json.dumps(good | {"num_experts": 16}))
    with pytest.raises(InputError, match="num_experts 16"), eq.laser(model, eq.load_laser(path)):
        pass


def test_wrong_calls():
    model = FAMILIES["mixtral"]()
    free = Thresholds.of(model, FREE)
    with pytest.raises(InputError, match="not both"), eq.laser(model, free, calibration=batches()):
        pass
    for wrong in ({"max_loss_increase": 0.1}, {"keep_strongest": False}):
        with pytest.raises(InputError, match="calibration batches"), eq.laser(model, free, **wrong):
            pass
    with pytest.raises(InputError, match="window"), eq.laser(model, free, window=-1):
        pass
    with pytest.raises(InputError, match="already"), eq.laser(model, free), eq.laser(model, free):
        pass
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        calibrate(model, batches(), max_loss_increase=2)
    with pytest.raises(InputError, match="no calibration text"):
        calibrate(model, [])
    assert not any("forward" in vars(module) for module in model.modules())


def test_threads_share_a_model():
    model = FAMILIES["mixtral"]()
    inputs = [batch(4, 16, seed=i) for i in range(4)]
    thresholds = Thresholds.of(model, FREE)
    with installed(model, thresholds, window=0):
        wanted = [run(model, **one) for one in inputs]
    got: dict[int, torch.Tensor] = {}
    with installed(model, thresholds, window=0) as routing:
        threads = [
            threading.Thread(target=lambda i=i: got.__setitem__(i, run(model, **inputs[i]))) for i in range(len(inputs))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(got[i], wanted[i]) for i in range(len(inputs)))
    assert routing.tokens[0] == sum(int(one["attention_mask"].sum()) for one in inputs)


def test_the_strongest_may_go_where_it_is_asked_for():
    model = FAMILIES["mixtral"]()
    texts = batches(4, 6)
    keeps = {}
    for keep in (True, False):
        with eq.laser(model, calibration=texts, max_loss_increase=1.0, keep_strongest=keep) as routing:
            keeps[keep] = {rule.keep for rule in routing.thresholds.rules if not rule.keeps}
    assert keeps[True] == {1}
    assert 0 in keeps[False]
