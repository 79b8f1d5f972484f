"""Forwards from a block on, against whole ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from equipoise.models import find_layers
from equipoise.profiling import lowered as lowered_module
from equipoise.profiling.lowered import lowered_divergence
from equipoise.profiling.replay import Replay, blocks_of, forward_as
from profiling.test_lowered import called
from tiny import FAMILIES


class Whole(Replay):
    """Runs everything, always."""

    def after(self, number: int, changed: nn.Module) -> torch.Tensor:
        return self._from(number, 0)


def predict_of(model: Any) -> Any:
    return lambda batch: model(**batch).logits.flatten(0, -2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured_as_by_whole_forwards(family: str, monkeypatch: pytest.MonkeyPatch):
    model = FAMILIES[family]()
    layers, batches = find_layers(model), [called(model, 0), called(model, 1)]
    assert Replay(model, batches, predict_of(model)).order
    found = lowered_divergence(model, layers, batches, "int8")
    monkeypatch.setattr(lowered_module, "Replay", Whole)
    np.testing.assert_allclose(found, lowered_divergence(model, layers, batches, "int8"), rtol=1e-4, atol=1e-10)


def test_blocks_before_the_change_are_not_run():
    model = FAMILIES["mixtral"]()
    replay = Replay(model, [called(model)], predict_of(model))
    runs: list[int] = []
    for number, block in enumerate(model.model.layers):
        block.self_attn.register_forward_hook(lambda *_, number=number: runs.append(number))
    last = len(model.model.layers) - 1
    assert torch.equal(replay.after(0, model.model.layers[last].mlp.experts), replay.before[0])
    assert runs == [last]
    runs.clear()
    replay.after(0, model.lm_head)  # in no block: everything
    assert runs == list(range(last + 1))


class Block(nn.Module):
    """Adds what the one before gave, and, where it has one, what another block kept."""

    def __init__(self, other: Any = None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.kept: Any = None
        self.other = (other,)  # no child

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = self.linear(x)
        return x + self.kept + (0 if self.other[0] is None else self.other[0].kept)


class Chain(nn.Module):
    """Blocks one after the other; `reads` says that the fourth reads the second's state, `twice` runs one again."""

    def __init__(self, reads: bool = False, twice: bool = False, forgets: bool = False) -> None:
        super().__init__()
        second = Block()
        self.layers = nn.ModuleList([Block(), second, Block(), Block(second if reads else None)])
        self.twice, self.forgets = twice, forgets

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.forgets:
            self.layers[1].kept = None
        for layer in self.layers:
            x = layer(x)
        return self.layers[0](x) if self.twice else x


def replay_of(model: nn.Module, inputs: int = 2) -> Replay:
    batches = [{"x": torch.randn(5, 4)} for _ in range(inputs)]
    return Replay(model, batches, lambda batch: model(**batch))  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "size"), [({}, 4), ({"reads": True}, 0), ({"twice": True}, 0),
                                            ({"reads": True, "forgets": True}, 0)])  # fmt: skip
@pytest.mark.parametrize("inputs", [1, 2])
def test_a_model_whose_blocks_read_more_is_run_whole(
    kind: dict[str, bool], size: int, inputs: int, caplog: pytest.LogCaptureFixture
):
    torch.manual_seed(0)
    model = Chain(**kind)
    with caplog.at_level("INFO"):
        replay = replay_of(model, inputs)
    assert ("every forward is whole" in caplog.text) == (not size)
    assert len(replay.order) == size
    with torch.no_grad():
        model.layers[2].linear.weight.mul_(2)
        for number, batch in enumerate(replay._inputs):
            torch.testing.assert_close(replay.after(number, model.layers[2].linear), model(**batch))
    assert not any("forward" in block.__dict__ or block._forward_hooks for block in model.layers)


def test_a_block_that_writes_into_its_input_changes_nothing_that_is_kept():
    class Writes(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2)

    model = Chain()
    model.layers[3] = Writes()
    replay = replay_of(model)
    assert len(replay.order) == 4
    first, second = (replay.after(0, model.layers[3]) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, replay.before[0])


def test_no_input_is_no_forward():
    assert Replay(Chain(), [], lambda batch: batch).before == []  # type: ignore[arg-type,return-value]


def test_a_replaced_forward_is_put_back_after_an_error():
    block = Block()
    with forward_as(block, lambda x: x):
        own = block.__dict__["forward"]
        with pytest.raises(ZeroDivisionError), forward_as(block, lambda x: 1 / 0):
            block(torch.ones(1, 4))
        assert block.__dict__["forward"] is own
    assert "forward" not in block.__dict__
    assert blocks_of(Chain()) != []
