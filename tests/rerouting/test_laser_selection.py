"""The selection rule alone: what it never does, whatever the scores; how balanced it gets, against a linear program."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from equipoise.errors import InputError
from equipoise.rerouting.prices import count
from equipoise.rerouting.selection import Rule, distribution, pools, select, select_on_host, select_tensors


def skewed(tokens: int, experts: int, seed: int, sharpness: float = 1.0) -> torch.Tensor:
    """float32 [T, E]: softmax of noise plus a taste that all tokens share."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=draw) * sharpness + torch.linspace(1.5, 0, experts)
    return logits.softmax(-1)


def run(p: torch.Tensor, k: int, rule: Rule, **other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(the family's choice, the new one, moved)."""
    index = p.topk(k, -1).indices
    experts = p.shape[1]
    inputs = {"slots": torch.ones(experts), "before": torch.zeros(experts)} | other
    decision = select(p, index, rule, **inputs)
    assert decision is not None
    assert torch.equal(decision.load, count(decision.index, experts, inputs.get("real")))
    assert decision.rerouted == int(decision.moved.sum())
    return index, decision.index, decision.moved


cases = st.tuples(
    st.integers(1, 60),
    st.integers(2, 12),
    st.integers(1, 4),
    st.integers(0, 10_000),
    st.floats(0.05, 1),
    st.floats(0.3, 1),
)


@given(cases)
@settings(max_examples=80, deadline=None)
def test_invariants(case: tuple[int, int, int, int, float, float]):
    tokens, experts, k, seed, gap, mass = case
    k = min(k, experts)
    p = skewed(tokens, experts, seed)
    real = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.8
    rule = Rule(gap=gap, mass=mass, extra=3)
    index, chosen, moved = run(p, k, rule, real=real)
    for t in range(tokens):
        own, new = index[t].tolist(), chosen[t].tolist()
        assert len(set(new)) == k
        if not moved[t]:
            assert own == new
            continue
        assert real[t]
        assert own != new
        scores = p[t]
        total = float(scores[own].sum())
        assert total <= mass + 1e-5
        if k > 1:
            assert own[0] in new
        kth = float(scores[own[-1]])
        order = scores.argsort(descending=True).tolist()
        for e in set(new) - set(own):
            assert kth - float(scores[e]) <= gap * total + 1e-6
            assert order.index(e) < k + 3
    # Never less balanced than the family's own choice.
    before, after = count(index, experts, real).max(), count(chosen, experts, real).max()
    assert after <= before


@given(cases)
@settings(max_examples=40, deadline=None)
def test_batch_order_does_not_matter(case: tuple[int, int, int, int, float, float]):
    tokens, experts, k, seed, gap, mass = case
    k = min(k, experts)
    p = skewed(tokens, experts, seed)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed + 1))
    rule = Rule(gap=gap, mass=mass)
    _, chosen, _ = run(p, k, rule)
    _, shuffled, _ = run(p[order], k, rule)
    assert torch.equal(chosen[order], shuffled)


def optimum(p: torch.Tensor, k: int, rule: Rule) -> float:
    """Least possible load of the busiest expert when each token keeps its strongest and draws k - 1 from its pool."""
    value, expert = pools(p, p.topk(k, -1).indices, rule)
    tokens, experts = p.shape
    keep = min(1, k - 1)
    free = value[:, keep:].isfinite().numpy()
    names = expert[:, keep:].numpy().reshape(-1)
    n = names.size
    load = sp.csr_matrix((np.ones(n), (names, np.arange(n))), shape=(experts, n))
    load = sp.hstack([load, -np.ones((experts, 1))])
    each = sp.csr_matrix((np.ones(n), (np.repeat(np.arange(tokens), n // tokens), np.arange(n))), shape=(tokens, n + 1))
    fixed = np.bincount(expert[:, :keep].reshape(-1).numpy(), minlength=experts)
    bounds = [(0, int(f)) for f in free.reshape(-1)] + [(0, None)]
    answer = linprog(np.eye(n + 1)[n], A_ub=load, b_ub=-fixed, A_eq=each, b_eq=np.full(tokens, k - keep), bounds=bounds)
    return float(answer.x[-1])


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (16, 2), (16, 4), (8, 1)])
@pytest.mark.parametrize("gap", [0.1, 0.4])
def test_near_the_optimum_of_the_linear_program(experts: int, k: int, gap: float):
    p = skewed(512, experts, seed=experts + k)
    rule = Rule(gap=gap, extra=4)
    index, chosen, _ = run(p, k, rule)
    raw, got, least = float(count(index, experts).max()), float(count(chosen, experts).max()), optimum(p, k, rule)
    assert least < 0.95 * raw  # there was something to win
    assert got <= raw
    assert raw - got >= 0.8 * (raw - least)


def test_gives_up_less_score_than_a_greedy_pass():
    p = skewed(512, 8, seed=3)
    rule = Rule(gap=0.4, extra=6)
    index, chosen, _ = run(p, 2, rule)
    value, expert = pools(p, index, rule)
    load, greedy = np.zeros(8), []
    for v, e in zip(value.tolist(), expert.tolist(), strict=True):
        load[e[0]] += 1
        second = min((load[e[j]], j) for j in range(1, len(e)) if v[j] > -1)[1]
        load[e[second]] += 1
        greedy.append([e[0], e[second]])
    lost = [float((p.gather(1, index) - p.gather(1, c)).sum()) for c in (chosen, torch.tensor(greedy))]
    assert lost[0] < 0.7 * lost[1]
    assert float(count(chosen, 8).max()) <= load.max()


def test_the_target_bounds_how_much_moves():
    p = skewed(512, 8, seed=3)
    moved = [int(run(p, 2, Rule(gap=0.4, target=t))[2].sum()) for t in (1.0, 1.4, 1.8, 50.0)]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > moved[2] > 0
    assert moved[3] == 0


def test_replicas_and_the_window_count():
    # Four strongest experts in turn, expert 4 second of all, expert 5 nearly as good.
    p = torch.zeros(40, 7)
    p[torch.arange(40), torch.arange(40) % 4] = 0.5
    p[:, 4] = 0.26 + torch.linspace(0, 0.1, 40)
    p[:, 5] = 0.24
    rule = Rule(gap=0.2, extra=2)
    index, chosen, _ = run(p, 2, rule)
    assert count(index, 7).tolist() == [10, 10, 10, 10, 40, 0, 0]
    assert count(chosen, 7).tolist() == [10, 10, 10, 10, 20, 20, 0]
    # The tokens that lose least by it are those that go.
    assert (chosen[:20] == 5).any(-1).all()
    # With eight slots the fourth expert is not busy any more.
    slots = torch.ones(7)
    slots[4] = 8
    assert not run(p, 2, rule, slots=slots)[2].any()
    # Load of earlier batches keeps tokens away from the fifth.
    before = torch.zeros(7)
    before[5] = 35
    _, chosen, _ = run(p, 2, rule, before=before)
    assert 0 < int(count(chosen, 7)[5]) <= 5


def test_nothing_to_decide():
    p = skewed(5, 4, seed=0)
    for rule in (Rule(), Rule(gap=0.5, extra=0), Rule(gap=0.5, rounds=0), Rule(gap=0.5, mass=0)):
        index, chosen, moved = run(p, 2, rule)
        assert chosen is index
        assert not moved.any()
    wide = Rule(gap=1, extra=4)
    index, chosen, moved = run(p, 4, wide)  # k = E
    assert chosen is index
    index, chosen, moved = run(p[:0], 2, wide)
    assert chosen.shape == (0, 2)
    index, chosen, moved = run(skewed(5, 1, 0), 1, wide)  # one expert
    assert chosen is index
    index, chosen, moved = run(p, 2, wide, real=torch.zeros(5, dtype=torch.bool))
    assert torch.equal(chosen, index)
    assert not moved.any()


def test_distribution_leaves_out_what_the_family_rules_out():
    scores = torch.tensor([[0.5, -torch.inf, 0.0, 0.25], [-0.5, 0.5, -torch.inf, -torch.inf]])
    p = distribution(scores, logits=False)
    assert p[0].tolist() == pytest.approx([2 / 3, 0, 0, 1 / 3])
    assert p[1, 2:].tolist() == [0, 0]
    assert p[1, 1] > p[1, 0]
    assert distribution(scores, logits=True)[0].sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "wrong",
    [{"gap": -1}, {"mass": 2}, {"target": 0.1}, {"extra": -1}, {"rounds": 1.5}, {"keep": -1}, {"gap": float("nan")}],
)
def test_wrong_rules(wrong: dict[str, float]):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Rule(**wrong)  # type: ignore[arg-type]


def exact(tokens: int, experts: int, seed: int) -> torch.Tensor:
    """float32 [T, E], multiples of 1/256 with many equal ones: sums are exact in any order."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 40, (tokens, experts), generator=draw).float() / 256


@given(cases, st.booleans(), st.integers(0, 2))
@settings(max_examples=150, deadline=None)
def test_the_compiled_form_is_the_tensor_form(case: tuple[int, int, int, int, float, float], padded: bool, keep: int):
    tokens, experts, k, seed, gap, mass = case
    k = min(k, experts)
    scores = exact(tokens, experts, seed)
    scores[:, 0] += torch.where(scores[:, 0] > 0, 0.1250, 0)  # a busy one
    if seed % 3 == 0:
        scores = scores - (scores > 0) * 0.0625  # a bias takes some below 0
    if seed % 5 == 0 and k < experts:
        scores[:, -1] = -torch.inf
    draw = torch.Generator().manual_seed(seed)
    inputs = {
        "slots": torch.randint(1, 4, (experts,), generator=draw).float(),
        "before": torch.randint(0, 20, (experts,), generator=draw).float(),
        "real": torch.rand(tokens, generator=draw) < 0.8 if padded else None,
    }
    index = scores.sort(stable=True, dim=-1, descending=True).indices[:, :k].contiguous()
    # Scores are multiples of 1/256, so they can lie exactly on a threshold, where the last bit of a sum decides.
    rule = Rule(gap=max(gap - 0.0003, 0), mass=max(mass - 0.0003, 0), keep=keep, extra=3, rounds=15)
    loop, tensors = (form(scores, index, rule, **inputs) for form in (select, select_tensors))
    if tensors is None:  # k experts are chosen where fewer are allowed
        assert loop is None
        return
    assert loop is not None
    if not torch.equal(loop.index.sort(-1).values, tensors.index.sort(-1).values):
        # Two offers that are equal but for the last bit of a price: another expert, the same balance.
        busiest = [((d.load + inputs["before"]) / inputs["slots"]).max() for d in (loop, tensors)]
        assert busiest[0] == pytest.approx(float(busiest[1]))
        return
    assert torch.equal(loop.moved, tensors.moved)
    assert torch.equal(loop.load, tensors.load)
    assert (loop.tokens, loop.rerouted) == (tensors.tokens, int(tensors.rerouted))
    host = select_on_host(scores, index, rule, **inputs)
    assert host is not None
    assert torch.equal(host.index, loop.index)
    assert (host.index is index) == (loop.rerouted == 0)
    assert (host.load.tolist(), host.tokens, host.rerouted) == (loop.load.tolist(), loop.tokens, loop.rerouted)


@pytest.mark.parametrize("form", [select, select_on_host, select_tensors])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("logits", [True, False])
def test_scores_that_are_not_numbers(form: Any, bad: float, logits: bool):
    scores = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    scores[3, 6] = bad
    inputs = (scores, scores.topk(2, -1).indices, Rule(gap=1), torch.ones(8), torch.zeros(8))
    assert form(*inputs, logits=logits) is None
    real = torch.ones(5, dtype=torch.bool)
    real[3] = False
    # Where attention gave padding NaN, that is nobody's loss.
    assert form(*inputs, real, logits=logits) is not None


@pytest.mark.parametrize("form", [select, select_on_host, select_tensors])
def test_a_class_that_is_no_expert_is_neither_given_nor_taken(form: Any):
    scores = skewed(200, 9, seed=1).log()
    index = scores.topk(1, -1).indices
    slots = torch.ones(9)
    slots[8] = torch.inf
    decision = form(scores, index, Rule(gap=1), slots, torch.zeros(9), logits=True, experts=8)
    skips = index[:, 0] == 8
    assert skips.any()
    assert decision.moved.any()
    assert torch.equal(decision.index[:, 0] == 8, skips)
