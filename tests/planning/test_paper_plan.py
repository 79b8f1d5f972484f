import numpy as np
import pytest
from test_joint_plan import profile_of

from equipoise.errors import InputError
from equipoise.planning import plan

COUNTS = [[5, 40, 10, 9], [0, 0, 0, 0], [30, 1, 2, 3]]
WANDA = [[0.3, 0.9, 0.1, 0.5], [1, 2, 3, 4], [0.9, 0.2, 0.8, 0.4]]


def slots(made, layer):
    return [(s.expert, s.precision) for s in made.layers[layer].slots]


def test_algorithms_1_to_3():
    made = plan(profile_of(COUNTS, wanda=WANDA), preset="paper")
    # Layer 0: heavy hitter 1 gains an int8 slot; of the others expert 3 scores highest, so it is least important.
    assert slots(made, 0) == [(0, "original"), (1, "original"), (1, "int8"), (2, "original"), (3, "int8")]
    assert made.layers[1].is_identity
    assert slots(made, 2) == [(0, "original"), (0, "int8"), (1, "original"), (2, "int8"), (3, "original")]
    assert made.layers[0].slots[1].share == 0.5
    assert made.preset == "paper"
    # Two int8 slots for one original: 20 bytes of scales over the original, a layer.
    assert made.budget.plan_bytes == made.budget.limit_bytes == 3 * 4 * 2000 + 2 * 20


def test_the_other_direction_of_wanda():
    made = plan(profile_of(COUNTS, wanda=WANDA), preset="paper", wanda_low_is_important=False)
    assert made.layers[0].quantized().tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("strategy", "extra", "quantized"),
    [
        ("quantize-only", 0, [False, False, False, True]),
        ("quantize-heavy", 1, [False, True, False, False]),
        ("quantize-all", 0, [True, True, True, True]),
    ],
)
def test_ablations(strategy, extra, quantized):
    made = plan(profile_of(COUNTS, wanda=WANDA), preset="paper", strategy=strategy)
    assert len(made.layers[0].slots) == 4 + extra
    assert made.layers[0].quantized().tolist() == quantized
    assert made.layers[1].is_identity
    assert made.preset == strategy


def test_random_replicates_one_and_quantizes_another_and_is_seeded():
    profile = profile_of(np.arange(1, 81).reshape(5, 16))
    made = plan(profile, preset="paper", strategy="random", seed=3)
    for layer in made.layers:
        assert len(layer.slots) == 17
        assert layer.quantized().sum() == 1
        assert not layer.quantized()[layer.replicas().argmax()]
    assert made == plan(profile, preset="paper", strategy="random", seed=3)
    assert made.layers != plan(profile, preset="paper", strategy="random", seed=4).layers


def test_explicit_budget_below_the_algorithm_is_refused_with_numbers():
    with pytest.raises(InputError, match=r"needs 24,040 bytes \(1\.0017 .* allows 24,000"):
        plan(profile_of(COUNTS, wanda=WANDA), preset="paper", budget=1.0)


def test_missing_wanda_is_refused_and_frequency_is_not():
    with pytest.raises(InputError, match="importance 'wanda'"):
        plan(profile_of(COUNTS), preset="paper")
    made = plan(profile_of(COUNTS), preset="paper", importance="frequency")
    assert made.layers[0].quantized().tolist() == [True, False, False, False]


def test_a_single_expert_is_kept():
    assert plan(profile_of([[7]]), preset="paper").layers[0].is_identity


def test_paper_on_ranks_keeps_its_replicas():
    made = plan(profile_of(COUNTS, wanda=WANDA), preset="paper", ranks=2)
    assert [len(layer.slots) for layer in made.layers] == [5, 4, 5]
    assert {s.rank for s in made.layers[0].slots} == {0, 1}
    assert len({s.rank for s in made.layers[0].slots if s.expert == 1}) == 2


def test_what_only_joint_can_do_is_refused():
    profile = profile_of(COUNTS, wanda=WANDA)
    for overrides in ({"replicas": 2}, {"slots": 8}, {"group_limited": True}):
        with pytest.raises(InputError, match="use preset joint"):
            plan(profile, preset="paper", **overrides)
