"""Plans applied in memory: what must not change, does not; what a plan changes, changes a little."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families_support import (
    NAMES,
    identity_slots,
    is_routed,
    logits,
    make_plan,
    mixed_slots,
    own_model,
    padded,
    replica_slots,
    shared_model,
)

from equipoise.models import find_layers
from equipoise.profiling import watch
from equipoise.runtime import apply, expert_bytes
from equipoise.runtime.application import finish
from equipoise.runtime.experts import Slots
from equipoise.runtime.install import fill_layer
from equipoise.runtime.kernels import vector

IDS, MASK = padded([7, 12, 3, 9], "right")


@pytest.mark.parametrize("name", NAMES)
def test_identity_plan_is_bit_equal(name: str):
    model = own_model(name)
    plan = make_plan(model, identity_slots)
    apply(model, plan)
    assert not any(hasattr(layer.experts, "equipoise_slots") for layer in find_layers(model))
    assert torch.equal(logits(model, IDS, MASK), logits(shared_model(name), IDS, MASK))


@pytest.mark.parametrize("name", NAMES)
def test_identity_through_slots_is_eager(name: str, monkeypatch: pytest.MonkeyPatch):
    """The runtime itself, with one slot an expert, against transformers' plain loop over the experts."""
    model, eager = own_model(name), own_model(name)
    plan = make_plan(model, identity_slots)
    for layer, layer_plan in zip(find_layers(model), plan.layers, strict=True):
        fill_layer(layer, layer_plan)
        assert isinstance(layer.experts.equipoise_slots, Slots)
    finish(model, plan)
    eager.set_experts_implementation("eager")
    wanted = logits(eager, IDS, MASK)
    # The kernels of float32 models sum in another order.
    torch.testing.assert_close(logits(model, IDS, MASK), wanted, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(vector, "is_ready", lambda *_: False)
    torch.testing.assert_close(logits(model, IDS, MASK), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_replicas_alone_change_nothing(name: str):
    model = own_model(name)
    apply(model, make_plan(model, replica_slots))
    with watch(model) as load:
        out = logits(model, IDS, MASK)
    torch.testing.assert_close(out, logits(shared_model(name), IDS, MASK), rtol=1e-5, atol=1e-5)
    # The replicas really work: the tokens of a busy expert are shared by its slots.
    for counts, slots, layer in zip(load.counts, load.slot_counts, find_layers(model), strict=True):
        table = layer.experts.equipoise_slots.table
        busiest = int(counts.argmax())
        shared = [int(n) for n, slot in zip(slots, table.layer.slots, strict=True) if slot.expert == busiest]
        assert sum(slots) == sum(counts)
        assert sum(shared) == counts[busiest]
        assert all(n > 0 for n in shared) or counts[busiest] < 2 * len(shared)


@pytest.mark.parametrize("name", NAMES)
def test_lower_precision_changes_little_and_only_the_experts(name: str):
    model = own_model(name)
    layers = find_layers(model)
    before = {key: (p, p.detach().clone()) for key, p in model.named_parameters() if not is_routed(key, layers)}
    buffers = {key: b.detach().clone() for key, b in model.named_buffers()}
    assert len(before) < len(list(model.named_parameters()))
    plan = make_plan(model, mixed_slots)
    apply(model, plan)
    after = dict(model.named_parameters())
    for key, (parameter, value) in before.items():
        assert after[key] is parameter, key
        assert torch.equal(parameter, value), key
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[key]), key
    assert all(is_routed(key, find_layers(model)) for key in set(after) - set(before))
    assert sum(sum(sizes.values()) for sizes in expert_bytes(model).values()) == plan.budget.plan_bytes

    assert not torch.equal(logits(model, IDS, MASK), logits(shared_model(name), IDS, MASK))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_lower_precision_of_a_layer_is_close(name: str):
    """Layer by layer on the same tokens and routing: in the whole model a selection may flip and move the logits."""
    model, reference = own_model(name), shared_model(name)
    inputs: dict[str, tuple[Any, ...]] = {}
    hooks = [
        layer.experts.register_forward_pre_hook(lambda _, args, key=layer.name: inputs.__setitem__(key, args))
        for layer in find_layers(reference)
    ]
    logits(reference, IDS, MASK)
    for hook in hooks:
        hook.remove()
    apply(model, make_plan(model, mixed_slots))
    for layer, original in zip(find_layers(model), find_layers(reference), strict=True):
        if layer.name not in inputs:  # the experts for pictures
            continue
        wanted = original.experts(*inputs[layer.name])
        change = (layer.experts(*inputs[layer.name]) - wanted).norm() / wanted.norm()
        # W8A8 rounds activations too: up to 1.3 % of a layer in which a part of the slots is int8.
        assert 0 < change < 0.03, layer.name
