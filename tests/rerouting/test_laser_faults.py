"""LASER under bad input, on one family of each kind of router: clear errors, the state before the fault, no decision
where there is nothing to decide.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import equipoise as eq
from equipoise.errors import InputError
from equipoise.models import find_layers
from equipoise.rerouting import Rule, Thresholds, installed
from equipoise.rerouting.routers import router_of
from tiny import FAMILIES

KINDS = ["mixtral", "olmoe", "deepseek_v3", "gpt_oss", "phimoe", "zaya", "switch_transformers"]
"""Softmax then topk, the same in 16 bits, groups and biases, topk of logits, sparsemixer, a class that skips, top-1."""
FREE = Rule(gap=1, extra=6)


def text(model: Any, rows: int = 4, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch without padding; the decoder of an encoder-decoder gets the same."""
    ids = torch.randint(3, 120, (rows, length), generator=torch.Generator().manual_seed(seed))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch |= {"decoder_input_ids": ids, "decoder_attention_mask": batch["attention_mask"]}
    return batch


@torch.no_grad()
def run(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).logits


def routers(model: Any) -> list[Any]:
    return [router_of(model.get_submodule(layer.name.rpartition(".")[0])) for layer in find_layers(model)]


# A sigmoid makes finite scores of infinite logits.
@pytest.mark.parametrize(
    ("name", "bad"),
    [(n, b) for n in KINDS for b in (float("nan"), float("inf")) if (n, b) != ("deepseek_v3", float("inf"))],
)
def test_scores_that_are_not_numbers_are_an_error_and_forgotten(name: str, bad: float):
    model = FAMILIES[name]()
    first, second = text(model, seed=1), text(model, seed=2)
    thresholds = Thresholds.of(model, FREE)
    with installed(model, thresholds) as routing:
        run(model, first)
        wanted, tokens, moved = run(model, second), routing.tokens, routing.rerouted
    last = find_layers(model)[-1].layer_id

    def spoil(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0].clone()
        hidden.view(-1, hidden.shape[-1])[5, 3] = bad
        return (hidden, *args[1:])

    with installed(model, thresholds) as routing:
        run(model, first)
        before = routing.tokens, routing.rerouted
        hook = routers(model)[-1].register_forward_pre_hook(spoil)
        with pytest.raises(InputError, match=f"layer {last} gave scores that are NaN or infinite"):
            run(model, first)
        hook.remove()
        # The layers before the fault forgot that forward too.
        assert routing.tokens.tolist() == before[0].tolist()
        assert routing.rerouted.tolist() == before[1].tolist()
        # And the window is what it was: the next batch is routed as if there had been no fault.
        assert torch.equal(run(model, second), wanted)
        assert routing.tokens.tolist() == tokens.tolist()
        assert routing.rerouted.tolist() == moved.tolist()


def test_an_error_of_an_expert_leaves_the_state_before():
    model = FAMILIES["mixtral"]()
    batch = text(model)
    with installed(model, Thresholds.of(model, FREE)) as routing:
        run(model, batch)
        before = routing.tokens.tolist()

        def fail(*_: Any) -> None:
            raise RuntimeError("no memory")

        hook = find_layers(model)[1].experts.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="no memory"):
            run(model, batch)
        hook.remove()
        assert routing.tokens.tolist() == before
        run(model, batch)
        assert routing.tokens.tolist() == [2 * n for n in before]


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_of_padding_only_changes_nothing(name: str):
    model = FAMILIES[name]()
    padding = text(model)
    for key in padding:
        if key.endswith("attention_mask"):
            padding[key] = torch.zeros_like(padding[key])
    batch = text(model, seed=1)
    thresholds = Thresholds.of(model, FREE)
    with installed(model, thresholds) as routing:
        wanted = run(model, batch)
    plain = run(model, padding)
    with installed(model, thresholds) as routing, eq.watch(model) as load:
        assert torch.equal(run(model, padding).nan_to_num(7), plain.nan_to_num(7))
        assert routing.tokens.sum() == 0
        assert routing.rerouted.sum() == 0
        assert load.counts.sum() == 0
        # The window is empty still.
        assert torch.equal(run(model, batch), wanted)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek_v3", "gpt_oss", "phimoe"])
def test_an_empty_batch(name: str):
    model = FAMILIES[name]()
    hidden = getattr(model.config, "hidden_size", 32)
    router = routers(model)[-1]
    inputs: list[Any] = []
    hook = router.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True)
    run(model, text(model))
    hook.remove()
    args, kwargs = inputs[0]
    # Only the tokens go; what else the router is given (a selection bias) stays.
    empty = [a[:0] if isinstance(a, torch.Tensor) and a.ndim > 1 and a.shape[-1] == hidden else a for a in args]
    with torch.no_grad():
        plain = router(*empty, **kwargs)
        with installed(model, Thresholds.of(model, FREE)) as routing:
            got = router(*empty, **kwargs)
    assert routing.tokens.sum() == 0
    for a, b in zip(plain, got, strict=True):
        assert a is b is None or (a.shape == b.shape and a.dtype == b.dtype)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "gpt_oss", "qwen3_moe", "granitemoe", "qwen2_moe"])
@pytest.mark.parametrize(("experts", "k"), [(8, 8), (1, 1)])
def test_all_experts_or_one(name: str, experts: int, k: int):
    sizes = {"num_experts_per_tok": k}
    model = FAMILIES[name](**(sizes | _experts(name, experts)))
    assert find_layers(model)[0].num_experts == experts
    batch = text(model)
    plain = run(model, batch)
    with installed(model, Thresholds.of(model, FREE)) as routing, eq.watch(model) as load:
        assert torch.equal(run(model, batch), plain)
    assert load.top_k == k
    assert routing.tokens.tolist() == [48] * len(routing.layers)
    assert routing.rerouted.sum() == 0


def _experts(name: str, experts: int) -> dict[str, int]:
    return {"num_local_experts" if name in ("mixtral", "gpt_oss", "granitemoe") else "num_experts": experts}
