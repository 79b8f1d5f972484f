"""LASER inside every family's own router: nothing changes when nothing may, what changes is what the family allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from equipoise.errors import InputError
from equipoise.models import find_layers
from equipoise.profiling import watch
from equipoise.rerouting import Rule, Thresholds, installed
from equipoise.rerouting.routers import router_of
from tiny import EXPERTS, FAMILIES

KEEP = (Rule(), Rule(gap=1e-30), Rule(gap=1, target=1e6), Rule(gap=1, mass=1e-9))
"""Rules that never leave the top-k: some at once, some only after all the work of the selection."""
FREE = Rule(gap=1, extra=6)
WATCHED = {"granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "phimoe", "switch_transformers"}
"""Families whose routers do not call `torch.topk` by that name."""
_MODELS: dict[str, Any] = {}


def tiny_model(name: str) -> Any:
    """The family's tiny model, built once and never changed."""
    if name not in _MODELS:
        _MODELS[name] = FAMILIES[name]()
    return _MODELS[name]


def padded_batch(model: Any) -> dict[str, torch.Tensor]:
    """Four texts of 7 to 12 tokens, padded on the right; the decoder of an encoder-decoder gets the same."""
    lengths = [7, 12, 9, 11]
    ids = torch.randint(3, 120, (4, 12), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
    ids = ids * mask
    batch = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        batch |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    return batch


@torch.no_grad()
def run(model: Any) -> torch.Tensor:
    return model(**padded_batch(model)).logits


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_keeping_the_top_k_is_bit_equal(name: str):
    model = tiny_model(name)
    before = run(model)
    for rule in KEEP:
        with installed(model, Thresholds.of(model, rule)) as routing:
            assert torch.equal(run(model), before), rule
        assert routing.rerouted.sum() == 0
        assert routing.tokens.sum() > 0
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_weights_are_the_familys_own(name: str):
    """First MoE layer, which gets the same input either way: k different experts, and rows that kept their experts
    kept their weights bit by bit, while the weights of the others changed with them.
    """
    model = tiny_model(name)
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def note(key: str) -> Any:
        return lambda _, args: seen.setdefault(key, []).append((args[1], args[2]))

    def pass_over() -> None:
        seen.clear()
        hooks = [layer.experts.register_forward_pre_hook(note(layer.name)) for layer in find_layers(model)[:1]]
        # Only the first MoE layer gets the same input with and without LASER.
        run(model)
        for hook in hooks:
            hook.remove()

    layers = find_layers(model)
    table = hasattr(router_of(model.get_submodule(layers[0].name.rpartition(".")[0])), "tid2eid")
    pass_over()
    own = seen[layers[0].name][0]
    with installed(model, Thresholds.of(model, FREE), window=0) as routing:
        pass_over()
    new = seen[layers[0].name][0]
    if table:
        assert routing.fixed == (layers[0].layer_id,)
        assert torch.equal(own[0], new[0])
        assert torch.equal(own[1], new[1])
        return
    if name == "switch_transformers":
        rows = int(routing.rerouted[0])
        assert new[0].reshape(-1, EXPERTS).sum(-1).max() == 1
        assert rows > 0
        return
    same = (own[0] == new[0]).all(-1)
    assert int((~same).sum()) >= int(routing.rerouted[0])
    # Rows that kept their experts kept their weights, bit by bit.
    assert torch.equal(own[1][same], new[1][same])
    chosen, weights = new
    assert bool(weights.isfinite().all())
    assert int(chosen.min()) >= 0
    assert int(chosen.max()) < EXPERTS
    if chosen.shape[1] > 1:
        assert bool((chosen.sort(-1).values.diff(dim=-1) > 0).all())
    if not bool(same.all()):
        assert not torch.equal(own[1][~same], new[1][~same])


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_reroutes_and_is_better_balanced(name: str):
    model = tiny_model(name)
    with watch(model) as before:
        run(model)
    with installed(model, Thresholds.of(model, FREE), window=0) as routing, watch(model) as after:
        run(model)
    ran = before.counts.sum(1) > 0
    assert routing.rerouted.sum() > 0
    assert not any("forward" in vars(module) for module in model.modules())
    # The first layer sees the same input; later ones do not, so only it must not be worse.
    first = int(ran.argmax())
    assert after.counts[first].max() <= before.counts[first].max()
    assert after.counts[first].sum() >= before.counts[first].sum()  # Switch drops fewer tokens, the others none


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_later_forwards_decide_as_the_first(name: str):
    """The first watches every call of the router; later ones only the selection, where the family's code allows it."""
    model = tiny_model(name)
    with installed(model, Thresholds.of(model, FREE), window=0) as routing:
        first = run(model)
        rerouted = routing.rerouted
        assert torch.equal(run(model), first)
        assert torch.equal(run(model), first)
        assert routing.rerouted.tolist() == (3 * rerouted).tolist()
        patches = [vars(module)["forward"].__self__ for module in model.modules() if "forward" in vars(module)]
        # A tower for pictures has seen nothing.
        assert [patch.direct for patch in patches] == [name not in WATCHED and n > 0 for n in routing.tokens]


def test_groups_are_respected():
    """DeepSeek-V3: no token gets an expert outside the groups that its router chose."""
    model = tiny_model("deepseek_v3")
    layer = find_layers(model)[0]
    router = router_of(model.get_submodule(layer.name.rpartition(".")[0]))
    assert router is not None
    inputs: list[torch.Tensor] = []
    hook = router.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with installed(model, Thresholds.of(model, FREE), window=0):
        chosen: list[torch.Tensor] = []
        other = layer.experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
        run(model)
        other.remove()
    hook.remove()
    hidden = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
    with torch.no_grad():
        scores = (hidden @ router.weight.float().T).sigmoid() + router.e_score_correction_bias
    groups = (
        scores.view(len(scores), router.num_group, -1).topk(2, -1).values.sum(-1).topk(router.topk_group, -1).indices
    )
    group_of = chosen[0] // (EXPERTS // router.num_group)
    assert bool((group_of[:, :, None] == groups[:, None, :]).any(-1).all())


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_weights_by_the_formula(name: str):
    """The weights of rerouted tokens against the family's formula, written out for four kinds."""
    model = tiny_model(name)
    layer = find_layers(model)[0]
    router = router_of(model.get_submodule(layer.name.rpartition(".")[0]))
    assert router is not None
    outputs: list[Any] = []
    with installed(model, Thresholds.of(model, FREE), window=0) as routing:
        hook = router.register_forward_hook(lambda _, args, out: outputs.append(out))
        run(model)
        hook.remove()
    assert routing.rerouted[0] > 0
    logits, weights, index = outputs[0]
    if name == "gpt_oss":
        wanted = logits.gather(1, index).softmax(-1)
    elif name == "deepseek_v3":
        wanted = logits.sigmoid().gather(1, index)
        wanted = wanted / (wanted.sum(-1, keepdim=True) + 1e-20) * router.routed_scaling_factor
    else:
        wanted = logits.softmax(-1).gather(1, index)
        if name == "mixtral" or router.norm_topk_prob:
            wanted = wanted / wanted.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, wanted.to(weights.dtype))
    assert not torch.equal(index.sort(-1).values, logits.topk(index.shape[1], -1).indices.sort(-1).values)


class OtherRouter(nn.Module):
    """Selects by sorting, which no adapter knows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> Any:
        logits = hidden.reshape(-1, hidden.shape[-1]) @ self.inner.weight.T
        order = logits.softmax(-1).sort(-1, descending=True)
        return logits, order.values[:, :2], order.indices[:, :2]


class TwiceRouter(OtherRouter):
    """Calls topk twice on the scores of all experts."""

    def forward(self, hidden: torch.Tensor) -> Any:
        logits = hidden.reshape(-1, hidden.shape[-1]) @ self.inner.weight.T
        torch.topk(logits, 2, -1)
        top = torch.topk(logits.softmax(-1), 2, -1)
        return logits, top.values, top.indices


def test_an_unknown_router_is_refused():
    model = FAMILIES["mixtral"]()
    block = model.model.layers[1].mlp
    block.gate = OtherRouter(block.gate)
    with pytest.raises(InputError, match="OtherRouter"), installed(model, Thresholds.of(model, FREE)):
        pass
    block.gate = TwiceRouter(block.gate.inner)
    with installed(model, Thresholds.of(model, FREE)), pytest.raises(InputError, match=r"TwiceRouter.*2 selections"):
        run(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_gradients_go_through_the_weights_of_what_was_chosen():
    """As in a forward whose selection was made by hand: the scores that LASER read are no way around the graph."""
    model = tiny_model("mixtral")
    layer = find_layers(model)[0]
    router = router_of(model.get_submodule(layer.name.rpartition(".")[0]))
    assert router is not None
    hidden = torch.randn(18, router.weight.shape[1], generator=torch.Generator().manual_seed(3))
    with installed(model, Thresholds.of(model, FREE), window=0) as routing:
        for _ in range(2):  # watched, then direct
            _, weights, index = router(hidden)
            assert routing.rerouted[0] > 0
            p = (hidden @ router.weight.T).softmax(-1).gather(1, index)
            found, wanted = (
                torch.autograd.grad((w * torch.arange(1, 3)).sum(), router.weight)[0]
                for w in (weights, p / p.sum(-1, keepdim=True))
            )
            assert wanted.abs().sum() > 0
            torch.testing.assert_close(found, wanted)
