"""From a measured profile through a real plan back into every family: what a user runs."""

from __future__ import annotations

import numpy as np
import pytest
from families_support import NAMES, batch_of, logits, own_model, padded, shared_model, text

from equipoise.metrics import lis, slot_lis
from equipoise.models import find_layers
from equipoise.options import ProfileOptions
from equipoise.planning import plan
from equipoise.profiling import profile, watch
from equipoise.runtime import apply, expert_bytes
from equipoise.types import Profile

_PROFILES: dict[str, Profile] = {}


def measured(name: str) -> Profile:
    if name not in _PROFILES:
        model = shared_model(name)
        batches = [batch_of(model, *padded([12, 7], "right", seed)) for seed in (50, 60)]
        batches.append(batch_of(model, text(2, 12, seed=70)))
        _PROFILES[name] = profile(model, batches, ProfileOptions(importance_tokens=100))
    return _PROFILES[name]


@pytest.mark.parametrize("name", NAMES)
def test_importance_is_measured(name: str):
    result = measured(name)
    assert {"error", "wanda"} <= set(result.importance)
    used = result.counts > 0
    for key in ("error", "wanda"):
        values = result.importance[key]
        assert values.shape == result.counts.shape
        assert np.isfinite(values).all()
        assert (values >= 0).all()
        # All batches are sampled: exactly the experts that met a token have an importance.
        np.testing.assert_array_equal(values > 0, used, err_msg=key)


@pytest.mark.parametrize("preset", ["joint", "paper"])
@pytest.mark.parametrize("name", NAMES)
def test_a_real_plan_runs(name: str, preset: str):
    made = plan(measured(name), preset=preset)
    model = own_model(name)
    original = sum(sum(sizes.values()) for sizes in expert_bytes(model).values())
    apply(model, made)
    held = sum(sum(sizes.values()) for sizes in expert_bytes(model).values())
    assert made.budget.original_bytes == original
    assert held == made.budget.plan_bytes <= made.budget.limit_bytes
    assert made.num_replicas > 0
    ids = text(4, 12, seed=50)
    with watch(model) as load:
        out = logits(model, ids)
    assert out.isfinite().all()
    slots = zip(load.slot_counts, find_layers(model), strict=True)
    after = np.array([slot_lis(counts, layer.num_experts) for counts, layer in slots])
    before = lis(load.counts)
    if preset == "joint":
        assert after.mean() < before.mean()
        return
    # One replica of the heavy hitter a layer; on other text, another expert may be the busiest.
    assert after.mean() <= before.mean()
    for counts, layer_plan in zip(measured(name).counts, made.layers, strict=True):
        spare = layer_plan.replicas() - 1
        assert spare.sum() == (counts.sum() > 0)
        assert spare[counts.argmax()] == spare.sum()
