"""`StreamingBalancer(model, replicas=R)`: where room for replicas comes from, and when there is none."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

import equipoise as eq
from core_models import batch
from equipoise.models import find_layers
from equipoise.runtime import expert_bytes, plan_of
from families.families_support import identity_slots, make_plan, own_model
from runtime.balancer_cases import skewed
from tiny import EXPERTS, build


@cache
def profile_of(dtype: torch.dtype) -> eq.Profile:
    return eq.profile(build("mixtral", dtype=dtype), [batch(rows=8, length=24, seed=seed) for seed in range(3)])


def total(model) -> int:
    return sum(sum(sizes.values()) for sizes in expert_bytes(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_without_a_plan_is_given_one_within_its_own_bytes(dtype):
    model = build("mixtral", dtype=dtype)
    before = total(model)
    with eq.StreamingBalancer(model, "short", replicas=2, profile=profile_of(dtype)) as balancer:
        assert (balancer.slots.sum(1) == EXPERTS + 2).all()
        assert total(model) <= before
        balancer.observe(skewed(model, 7))
        assert (balancer.slots[:, 7] == 3).all()
        assert total(model) <= before
        model(**batch())
    assert plan_of(model).num_replicas == 2 * len(find_layers(model))
    assert plan_of(model).budget.plan_bytes == total(model)


def test_a_budget_is_kept_and_one_without_room_is_refused():
    model = build("mixtral", dtype=torch.bfloat16)
    before = total(model)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(eq.InputError, match="budget"):
        eq.StreamingBalancer(model, replicas=EXPERTS, profile=profile_of(torch.bfloat16), budget=0.7)
    assert plan_of(model) is None
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    eq.StreamingBalancer(model, replicas=2, profile=profile_of(torch.bfloat16), budget=0.8)
    assert total(model) <= 0.8 * before


def test_what_has_no_room_says_what_to_do():
    plain = own_model("mixtral")
    for arguments, word in (
        ({}, "give replicas and the model's profile"),
        ({"replicas": 2}, "give profile=equipoise.profile"),
        ({"replicas": 0, "profile": profile_of(torch.float32)}, "at least 1"),
        ({"replicas": True, "profile": profile_of(torch.float32)}, "at least 1"),
        ({"replicas": 2, "profile": profile_of(torch.bfloat16)}, "made for a model with dtype"),
        ({"profile": profile_of(torch.float32)}, "no plan"),
    ):
        with pytest.raises(eq.InputError, match=word):
            eq.StreamingBalancer(plain, **arguments)
        assert plan_of(plain) is None


def test_a_model_with_a_plan_has_the_room_of_its_plan():
    model = build("mixtral", dtype=torch.bfloat16)
    eq.apply(model, eq.plan(profile_of(torch.bfloat16), replicas=2, budget=1.0))
    assert (eq.StreamingBalancer(model, replicas=2).slots.sum(1) == EXPERTS + 2).all()
    for arguments, word in (
        ({"replicas": 3}, "2 spare slots a layer, not 3"),
        ({"replicas": 2, "profile": profile_of(torch.bfloat16)}, "has a plan already"),
        ({"budget": 2.0}, "has a plan already"),
    ):
        with pytest.raises(eq.InputError, match=word):
            eq.StreamingBalancer(model, **arguments)
    without = own_model("mixtral")
    eq.apply(without, make_plan(without, identity_slots))
    with pytest.raises(eq.InputError, match="0 spare slots a layer, not 2"):
        eq.StreamingBalancer(without, replicas=2)


def test_replicas_of_a_plan_made_here_compute_what_their_primaries_do():
    """Spare slots in int8 beside int8 primaries: moving them changes no more than which slot a token meets."""
    model = build("mixtral", dtype=torch.bfloat16)
    balancer = eq.StreamingBalancer(model, "short", replicas=4, profile=profile_of(torch.bfloat16))
    wanted = model(**batch()).logits
    with balancer:
        for expert in (1, 5):
            balancer.observe(skewed(model, expert))
            assert np.array_equal(balancer.slots[:, expert], np.full(len(find_layers(model)), 5))
        found = model(**batch()).logits
    assert torch.isfinite(found).all()
    # A token that the last bit of bfloat16 sends to another expert is another token: nine of ten are near.
    near = (found - wanted).abs().amax(-1) <= 0.1 * wanted.abs().max()
    assert near.float().mean() >= 0.9
