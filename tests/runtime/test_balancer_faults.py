"""The balancer when things go wrong around it: empty batches, padding, forwards that fail, many swaps under threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

import equipoise as eq
from core_models import batch
from equipoise.models import find_layers
from equipoise.runtime import expert_bytes
from equipoise.types import Slot
from families.families_support import make_plan, own_model
from runtime.balancer_cases import FREE, SPARE, balanced, logits, skewed
from tiny import EXPERTS


def counters(balancer):
    return (balancer.windows.tokens, balancer.windows.count, balancer.steps, balancer.moves, tuple(balancer.failures))


@torch.no_grad()
def test_a_batch_of_nothing_and_one_of_padding_say_nothing():
    model = balanced()
    wanted = logits(model)
    with eq.StreamingBalancer(model, history="short", window=4) as balancer:
        before = counters(balancer)
        inputs = batch()
        for layer in find_layers(model):
            nothing = torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
            assert layer.experts(*nothing).shape == (0, 32)
        with pytest.raises(RuntimeError, match="0 elements"):  # transformers' own attention does not take one
            model(input_ids=inputs["input_ids"][:0], attention_mask=inputs["attention_mask"][:0])
        assert counters(balancer) == before
        model(input_ids=inputs["input_ids"], attention_mask=torch.zeros_like(inputs["attention_mask"]))
        assert counters(balancer) == before
        assert torch.allclose(logits(model), wanted, atol=1e-5)
        assert balancer.windows.count == 1
        assert balancer.windows.tokens == 42  # 48 places, 6 of them padding


class Broken(Exception):
    pass


@torch.no_grad()
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_kernel_that_fails_in_the_middle_of_a_forward_leaves_all_as_it_was(row, monkeypatch):
    model = balanced("int8")
    wanted = logits(model)
    activation = find_layers(model)[row].experts.act_fn
    forward = activation.forward
    with eq.StreamingBalancer(model, history="short", window=42) as balancer:
        slots = balancer.slots

        def fails(*_, **__):
            raise Broken("the kernel")

        monkeypatch.setattr(activation, "forward", fails)
        with pytest.raises(Broken):
            logits(model)
        assert np.array_equal(balancer.slots, slots)
        assert (balancer.steps, balancer.moves, balancer.failures) == (0, 0, [])
        monkeypatch.setattr(activation, "forward", forward)
        assert torch.equal(logits(model), wanted)
        assert balancer.steps == 1
        # Nobody is taken to be inside the layer still: a slot can be written.
        balancer.observe(skewed(model, 7))
        assert (balancer.slots[:, 7] == 1 + SPARE).all()
        assert balancer.failures == []
    assert torch.equal(logits(model), wanted)


def test_a_mask_that_cannot_be_read_is_refused_and_the_next_forward_is_right():
    model = balanced()
    wanted = logits(model)
    inputs = batch()
    with eq.StreamingBalancer(model, history="short", window=42) as balancer:
        with torch.no_grad(), pytest.raises(eq.InputError, match="cannot be told"):
            model(input_ids=inputs["input_ids"], attention_mask=torch.zeros(4, 1, 12, 12))
        assert (balancer.steps, balancer.windows.tokens) == (0, 0)
        assert torch.equal(logits(model), wanted)
        balancer.observe(skewed(model, 7))
        assert (balancer.slots[:, 7] == 1 + SPARE).all()


def test_a_forward_that_never_ends_gives_the_move_up_and_keeps_the_map():
    model = balanced()
    entered, leave = threading.Event(), threading.Event()
    wanted = logits(model)

    def stuck(module, args):
        entered.set()
        leave.wait(30)

    handle = find_layers(model)[0].experts.register_forward_pre_hook(stuck)
    with eq.StreamingBalancer(model, history="short", window=10**9, drain_seconds=0.05) as balancer:
        thread = threading.Thread(target=logits, args=(model,))
        thread.start()
        assert entered.wait(30)
        slots = balancer.slots
        with pytest.warns(RuntimeWarning, match="has not ended"):
            balancer.observe(skewed(model, 7))
        assert np.array_equal(balancer.slots, slots)
        assert balancer.failed == 1
        handle.remove()
        leave.set()
        thread.join()
        balancer.observe(skewed(model, 7))
        assert (balancer.slots[:, 7] == 1 + SPARE).all()
        assert torch.allclose(logits(model), wanted, atol=1e-5)


def test_opened_again_it_starts_from_the_plans_own_replicas():
    model = balanced()
    balancer = eq.StreamingBalancer(model, options=FREE)
    planned = balancer.slots
    for expert in (7, 5):
        with balancer:
            assert np.array_equal(balancer.slots, planned)
            for _ in range(4):
                balancer.observe(skewed(model, expert))
            assert (balancer.slots[:, expert] == 1 + SPARE).all()
        assert np.array_equal(balancer.slots, planned)
    assert balancer.failures == []


def test_only_the_latest_failures_are_kept(monkeypatch):
    model = balanced()
    with eq.StreamingBalancer(model, history="short") as balancer:

        def fails():
            raise Broken("again")

        monkeypatch.setattr(balancer._policy, "decide", fails)
        for _ in range(103):
            with pytest.warns(RuntimeWarning):
                balancer.observe(skewed(model, 7))
        assert (balancer.failed, len(balancer.failures)) == (103, 100)


@torch.no_grad()
def test_a_hundred_swaps_under_eight_threads():
    """A small form of `benchmarks/streaming/live.py`, which does ten thousand and measures resident memory."""
    model = own_model("mixtral")
    slots = [Slot(e, share=0.5 if e < 2 else 1.0) for e in range(EXPERTS)] + [Slot(e, share=0.5) for e in range(2)]
    eq.apply(model, make_plan(model, lambda row: slots))
    inputs = [{k: v[:1, :4] for k, v in batch(seed=seed).items()} for seed in range(8)]
    wanted = [model(**i).logits for i in inputs]
    sizes, addresses = expert_bytes(model), {p.data_ptr() for p in model.parameters()}
    wrong, stop, began = [], threading.Event(), threading.Barrier(9)

    def serve(i):
        began.wait()
        with torch.no_grad():
            while not stop.is_set():
                if not torch.allclose(model(**inputs[i]).logits, wanted[i], atol=1e-5):
                    wrong.append(i)

    with eq.StreamingBalancer(model, history="short", window=10**9) as balancer:
        threads = [threading.Thread(target=serve, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        began.wait()
        for step in range(20):
            balancer.observe(skewed(model, step % EXPERTS))
        stop.set()
        for thread in threads:
            thread.join()
        assert balancer.failures == []
        assert balancer.moves == (1 + 19 * 2) * len(find_layers(model))  # one spare slot was at the first busy expert
        assert expert_bytes(model) == sizes
        assert {p.data_ptr() for p in model.parameters()} == addresses
    assert wrong == []
