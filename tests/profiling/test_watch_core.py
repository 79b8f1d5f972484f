"""`watch`: threads, generation with padding, masks it cannot read, and observers that fail."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from core_models import batch, random_slots
from equipoise.errors import InputError
from equipoise.models import find_layers
from equipoise.profiling import watch
from equipoise.runtime import apply
from families.families_support import make_plan, padded, reading_routers
from tiny import EXPERTS, FAMILIES


@pytest.mark.parametrize("balanced", [False, True])
def test_threads_add_up_exactly(balanced: bool):
    """Several threads on one model, each with batches of its own shape and padding."""
    model = FAMILIES["mixtral"]()
    if balanced:
        apply(model, make_plan(model, random_slots))
    batches = [batch(rows=2 + i % 3, length=6 + i, seed=i) for i in range(24)]
    with torch.no_grad(), watch(model) as alone:
        for inputs in batches:
            model(**inputs)
    start = threading.Barrier(6)

    def work(part: list[dict[str, torch.Tensor]]) -> None:
        start.wait()
        with torch.no_grad():
            for inputs in part:
                model(**inputs)

    with watch(model) as load, ThreadPoolExecutor(6) as pool:
        list(pool.map(work, [batches[i::6] for i in range(6)]))
    assert np.array_equal(load.counts, alone.counts)
    assert all(np.array_equal(a, b) for a, b in zip(load.slot_counts, alone.slot_counts, strict=True))
    real = sum(int(inputs["attention_mask"].sum()) for inputs in batches)
    assert load.counts.sum(1).tolist() == [2 * real] * 3
    assert load.top_k == 2


@torch.no_grad()
def test_two_watchers_at_once_and_none_afterwards():
    model = FAMILIES["olmoe"]()
    with watch(model) as outer:
        model(**batch(seed=1))
        with watch(model) as inner:
            model(**batch(seed=2))
    before = outer.counts
    model(**batch(seed=3))
    assert np.array_equal(outer.counts, before)
    assert 0 < inner.counts.sum() < outer.counts.sum()
    hooks = [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert not hooks


@torch.no_grad()
def test_reset():
    model = FAMILIES["olmoe"]()
    with watch(model) as load:
        model(**batch(seed=1))
        first = load.counts
        load.reset()
        assert not load.counts.any()
        model(**batch(seed=1))
        assert np.array_equal(load.counts, first)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "switch_transformers"])
@torch.no_grad()
def test_generate_with_left_padding(family: str):
    """Padding counts neither in the prompt nor while text is added; every other token does, as the router says."""
    model = FAMILIES[family]()
    lengths, new = [7, 3, 5], 4
    ids, mask = padded(lengths, "left")
    with watch(model) as load, reading_routers(model) as log:
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    assert np.array_equal(load.counts, log.counts(mask))
    if family != "switch_transformers":
        prompt, added = sum(lengths), len(lengths) * (new - 1)  # the last token is never read
        assert load.counts.sum(1).tolist() == [2 * (prompt + added)] * len(load.layers)


@torch.no_grad()
def test_generate_gives_each_text_the_count_it_has_alone():
    model = FAMILIES["mixtral"]()
    lengths = [7, 3, 5]
    ids, mask = padded(lengths, "left")
    kind = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with watch(model) as together:
        model.generate(input_ids=ids, attention_mask=mask, **kind)
    total = np.zeros_like(together.counts)
    for row, length in enumerate(lengths):
        with watch(model) as alone:
            model.generate(input_ids=ids[row : row + 1, -length:], **kind)
        total += alone.counts
    assert np.array_equal(together.counts, total)


@torch.no_grad()
def test_mask_of_four_axes_is_refused():
    model = FAMILIES["mixtral"]()
    ids = batch()["input_ids"]
    mask = torch.zeros(4, 1, 12, 12)
    with pytest.raises(InputError) as caught, watch(model):
        model(input_ids=ids, attention_mask=mask)
    assert "padding cannot be told from this attention mask" in str(caught.value)
    assert "pass the [batch, length] mask" in str(caught.value)
    assert "\n" not in str(caught.value)
    with watch(model) as load:  # and the next forward is counted as if nothing had happened
        model(input_ids=ids)
    assert load.counts.sum(1).tolist() == [2 * ids.numel()] * 3


@torch.no_grad()
def test_mask_of_another_batch_is_refused():
    model = FAMILIES["mixtral"]()
    experts = find_layers(model)[0].experts

    def intrude(*_: Any) -> None:
        experts(torch.randn(35, 32), torch.zeros(35, 2, dtype=torch.int64), torch.rand(35, 2))

    handle = model.get_submodule("model.layers.0").register_forward_pre_hook(intrude)
    with pytest.raises(InputError, match="the experts got 35 rows"), watch(model):
        model(**batch(rows=4, length=12))
    handle.remove()


@torch.no_grad()
def test_observer_errors_reach_the_caller():
    model = FAMILIES["mixtral"]()

    class Broken(Exception):
        pass

    def observer(row: int, *_: Any) -> None:
        if row == 1:
            raise Broken("in layer 1")

    with pytest.raises(Broken, match="in layer 1"), watch(model, observer):
        model(**batch())
    # Hooks are gone and the next watcher starts clean, also in this thread.
    with watch(model) as load:
        model(**batch())
    assert load.counts.sum(1).tolist() == [2 * int(batch()["attention_mask"].sum())] * 3


@torch.no_grad()
def test_an_error_inside_one_watched_forward_does_not_spoil_the_next():
    """The mask of the forward that failed must not be taken for the mask of the next one."""
    model = FAMILIES["mixtral"]()
    failing = True

    def observer(*_: Any) -> None:
        if failing:
            raise RuntimeError("once")

    with watch(model, observer) as load:
        with pytest.raises(RuntimeError, match="once"):
            model(**batch(rows=3, length=20))
        failing = False
        load.reset()
        inputs = batch(rows=2, length=8, seed=4)
        model(**inputs)
        assert load.counts.sum(1).tolist() == [2 * int(inputs["attention_mask"].sum())] * 3
        load.reset()
        model(input_ids=inputs["input_ids"])
        assert load.counts.sum(1).tolist() == [2 * inputs["input_ids"].numel()] * 3


@torch.no_grad()
def test_observer_sees_what_was_routed():
    model = FAMILIES["mixtral"]()
    seen = np.zeros((3, EXPERTS), dtype=np.int64)

    def observer(row: int, layer: Any, routing: Any, real: torch.Tensor | None) -> None:
        assert layer is load.layers[row]
        assert real is not None
        index = routing.index[real]
        seen[row] += torch.bincount(index.reshape(-1), minlength=EXPERTS).numpy()

    with watch(model, observer) as load:
        model(**batch())
    assert np.array_equal(seen, load.counts)


def test_model_without_experts_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **small))
    with pytest.raises(InputError, match="'llama' is not a Mixture-of-Experts model"), watch(model):
        pass
