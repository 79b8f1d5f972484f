"""`StreamingBalancer`: follows live load; outputs stay right; a failure leaves the old map; memory stays the plan's."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest
import torch

import equipoise as eq
from core_models import batch
from equipoise.models import find_layers
from equipoise.runtime import expert_bytes
from equipoise.runtime.live_layer import LiveLayer, Traffic
from equipoise.types import Slot
from families.families_support import identity_slots, make_plan, own_model
from runtime.balancer_cases import FREE, SPARE, balanced, logits, skewed
from tiny import EXPERTS


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("history", ["adaptive", "long", "short"])
def test_replicas_go_where_the_load_is_and_outputs_stay(history):
    model = balanced()
    wanted = logits(model)
    options = FREE if history == "adaptive" else None
    with eq.StreamingBalancer(model, history=history, options=options) as balancer:
        for _ in range(3):
            balancer.observe(skewed(model, 7))
        # Water-filling: all four replicas to the busy expert.
        assert (balancer.slots[:, 7] == 1 + SPARE).all()
        assert (balancer.slots.sum(1) == EXPERTS + SPARE).all()
        assert balancer.moves == 4 * len(balancer.slots)
        # Replicas at the primaries' own precision compute the same, whoever they belong to.
        assert torch.allclose(logits(model), wanted, atol=1e-5)
        with eq.watch(model) as load:
            logits(model)
        # An expert's tokens are spread over its slots evenly, to a token.
        for row, slots in enumerate(load.slot_counts):
            table = find_layers(model)[row].experts.equipoise_slots.table
            mine = table._arrays[2][table._arrays[1][7] : table._arrays[1][8]]
            assert len(mine) == 1 + SPARE
            assert slots[mine].sum() == load.counts[row, 7]
            assert slots.sum() == load.counts[row].sum()


def test_bytes_never_change_and_moved_bytes_are_those_of_the_slots():
    model = balanced("int8")
    before = expert_bytes(model)
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    with eq.StreamingBalancer(model, history="short") as balancer:
        balancer.observe(skewed(model, 7))
        assert expert_bytes(model) == before
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == addresses
        size = eq.runtime.slot_bytes(find_layers(model)[0].layout, "int8")
        assert balancer.moved_bytes == balancer.moves * size > 0


def test_a_moved_slot_holds_what_applying_a_plan_would_have_given_it():
    model = balanced("int8")
    other = own_model("mixtral")
    slots = [Slot(e) for e in range(EXPERTS - 1)] + [Slot(7, share=0.2)] + [Slot(7, "int8", share=0.2)] * SPARE
    eq.apply(other, make_plan(other, lambda row: slots))
    with eq.StreamingBalancer(model, history="short") as balancer:
        balancer.observe(skewed(model, 7))
        assert torch.equal(logits(model), logits(other))


def test_close_puts_the_plan_back_bit_for_bit():
    model = balanced("int8")
    before, wanted = state(model), logits(model)
    tables = [layer.experts.equipoise_slots for layer in find_layers(model)]
    with eq.StreamingBalancer(model, history="short") as balancer:
        balancer.observe(skewed(model, 7))
        balancer.observe(skewed(model, 5))
        assert not torch.equal(logits(model), wanted)
    after = state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [layer.experts.equipoise_slots for layer in find_layers(model)] == tables
    assert torch.equal(logits(model), wanted)
    balancer.close()  # again: nothing to do


def test_it_follows_forward_and_generate_by_itself():
    model = balanced()
    with eq.StreamingBalancer(model, history="short", window=50) as balancer, eq.watch(model) as load:
        logits(model)  # 48 places, 6 of them padding: not yet a window
        assert balancer.steps == 0
        logits(model, 1)
        assert balancer.steps == 1
        steps = balancer.steps
        model.generate(**{k: v[:1] for k, v in batch(seed=2).items()}, max_new_tokens=60, do_sample=False)
        assert balancer.steps > steps
        assert balancer.failures == []
    assert load.counts.sum() > 0


def test_a_window_is_seen_in_parts_that_add_up_to_what_was_watched(monkeypatch):
    model = balanced()
    with eq.StreamingBalancer(model, history="short", window=84) as balancer, eq.watch(model) as load:
        seen = []
        monkeypatch.setattr(balancer._policy, "observe", seen.append)
        monkeypatch.setattr(balancer._policy, "decide", lambda: balancer.slots)
        for seed in range(2):
            logits(model, seed)
        assert len(seen) == 1
        assert seen[0].shape == (2, *load.counts.shape)
        assert np.array_equal(seen[0].sum(0), load.counts)


class Broken(Exception):
    pass


def test_a_failure_while_writing_leaves_the_old_map_and_is_reported(monkeypatch):
    model = balanced("int8")
    before, wanted = state(model), logits(model)
    write = LiveLayer.write

    def fails_half_way(self, slot, expert):
        if expert == 7:
            with torch.no_grad():
                for name, parameter in self.module.named_parameters():
                    if "int8" in name:
                        parameter[self.original.table.pool_index[slot]].zero_()
            raise Broken("no more memory")
        write(self, slot, expert)

    with eq.StreamingBalancer(model, history="short") as balancer:
        monkeypatch.setattr(LiveLayer, "write", fails_half_way)
        old = balancer.slots
        with pytest.warns(RuntimeWarning, match="no more memory"):
            balancer.observe(skewed(model, 7))
        assert np.array_equal(balancer.slots, old)
        assert balancer.moves == 0
        assert len(balancer.failures) == 1
        assert torch.equal(logits(model), wanted)
        after = state(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        monkeypatch.setattr(LiveLayer, "write", write)
        balancer.observe(skewed(model, 7))
        assert (balancer.slots[:, 7] == 1 + SPARE).all()


def test_when_even_the_old_expert_cannot_be_written_the_slot_serves_nobody_until_it_can(monkeypatch):
    model = balanced()
    wanted = logits(model)
    write = LiveLayer.write

    def never(self, slot, expert):
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter[slot].fill_(float("nan"))
        raise Broken("gone")

    with eq.StreamingBalancer(model, history="short") as balancer:
        monkeypatch.setattr(LiveLayer, "write", never)
        with pytest.warns(RuntimeWarning, match="gone"):
            balancer.observe(skewed(model, 7))
        assert torch.allclose(logits(model), wanted, atol=1e-5)  # no NaN: nobody is sent there
        monkeypatch.setattr(LiveLayer, "write", write)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            balancer.observe(skewed(model, 7))
        assert (balancer.slots[:, 7] == 1 + SPARE).all()
        assert torch.allclose(logits(model), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("counts", "word"),
    [
        (np.ones((1, EXPERTS)), "layers"),
        (np.ones(3), "layers"),
        (np.ones((0, 3, EXPERTS)), "layers"),
        (np.full((3, EXPERTS), np.nan), "NaN"),
        (np.full((3, EXPERTS), np.inf), "inf"),
        (np.full((3, EXPERTS), -1), "from 0"),
        (np.full((3, EXPERTS), "a"), "from 0"),
    ],
)
def test_counts_that_are_none_are_refused_and_change_nothing(counts, word):
    model = balanced()
    assert len(find_layers(model)) == 3
    with eq.StreamingBalancer(model, history="short") as balancer:
        old = balancer.slots
        with pytest.raises(eq.InputError, match=word):
            balancer.observe(counts)
        assert np.array_equal(balancer.slots, old)
        assert balancer.steps == 0
        balancer.observe(np.zeros((3, EXPERTS)))  # a window of padding only says nothing
        assert balancer.steps == 0


def test_what_cannot_be_balanced_is_refused():
    plain = own_model("mixtral")
    with pytest.raises(eq.InputError, match="no plan"):
        eq.StreamingBalancer(plain)
    without = own_model("mixtral")
    eq.apply(without, make_plan(without, identity_slots))
    with pytest.raises(eq.InputError, match="no spare slot"):
        eq.StreamingBalancer(without)
    model = balanced()
    for arguments, word in (
        ({"history": "best"}, "adaptive, long, short"),
        ({"window": 0}, "window"),
        ({"history": "long", "options": FREE}, "options"),
    ):
        with pytest.raises(eq.InputError, match=word):
            eq.StreamingBalancer(model, **arguments)
    with eq.StreamingBalancer(model), pytest.raises(eq.InputError, match="another"), eq.StreamingBalancer(model):
        pass


def test_a_model_is_not_saved_while_its_weights_are_not_those_of_its_plan(tmp_path):
    model = balanced("int8")
    with eq.StreamingBalancer(model, history="short") as balancer:
        balancer.observe(skewed(model, 7))
        with pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(tmp_path / "open")
    model.save_pretrained(tmp_path / "closed")
    assert (tmp_path / "closed" / "config.json").is_file()


def test_drain_waits_for_forwards_that_began_before_and_only_for_those():
    traffic = Traffic()
    entered, leave = threading.Event(), threading.Event()

    def forward():
        traffic.enter()
        entered.set()
        leave.wait(10)
        traffic.leave()

    thread = threading.Thread(target=forward)
    thread.start()
    entered.wait(10)
    with pytest.raises(TimeoutError, match="has not ended"):
        traffic.drain(0.05)
    done = threading.Event()
    waiting = threading.Thread(target=lambda: (traffic.drain(10), done.set()))
    waiting.start()
    assert not done.wait(0.05)
    leave.set()
    assert done.wait(10)
    thread.join()
    waiting.join()
    traffic.drain(0)


def test_threads_generate_while_slots_move_and_each_gets_the_untouched_outputs():
    model = balanced()
    wanted = [logits(model, seed) for seed in range(4)]
    wrong, stop = [], threading.Event()

    def serve(seed):
        while not stop.is_set():
            if not torch.allclose(logits(model, seed), wanted[seed], atol=1e-5):
                wrong.append(seed)

    with eq.StreamingBalancer(model, history="short", window=10**9) as balancer:
        threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for i in range(40):
            balancer.observe(skewed(model, i % EXPERTS))
        stop.set()
        for thread in threads:
            thread.join()
        assert balancer.failures == []
        assert balancer.moves >= 39 * SPARE * 3
    assert wrong == []
