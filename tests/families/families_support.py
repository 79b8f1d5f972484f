"""What the tests of the model families share: cached models, batches, hand-made plans, and a count from the routers.

The count here never looks at the experts module, where equipoise counts: it reads what each router returns and
applies the family's own meaning to it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from equipoise.models import MoELayer, find_layers
from equipoise.runtime import slot_bytes
from equipoise.types import Budget, LayerPlan, ModelIdentity, Plan, Slot
from tiny import EXPERTS, FAMILIES

NAMES = list(FAMILIES)
"""Every family with a tiny model."""


@cache
def shared_model(name: str) -> PreTrainedModel:
    """The family's model, built once. Never change it: take `own_model` for that."""
    return FAMILIES[name]()


def own_model(name: str) -> PreTrainedModel:
    """A copy to change."""
    return copy.deepcopy(shared_model(name))


def text(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """int64 [rows, length] token ids without padding, special tokens and the placeholders of pictures."""
    return torch.randint(3, 120, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths: list[int], side: str, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of several lengths in one batch.

    Args:
        lengths: of each row's text.
        side: `left` or `right`, where the padding goes.
        seed: of the tokens; row i is the same text on either side.

    Returns:
        input ids and attention mask, int64 [rows, max(lengths)].
    """
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(longest - length, None) if side == "left" else slice(0, length)
        ids[row, where] = text(1, length, seed + row)[0]
        mask[row, where] = 1
    return ids, mask


def batch_of(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Inputs of a forward; the decoder of an encoder-decoder gets the same text."""
    mask = torch.ones_like(ids) if mask is None else mask
    batch = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        batch |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    return batch


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a forward."""
    return model(**batch_of(model, ids, mask)).logits


def router_of(model: PreTrainedModel, layer: MoELayer) -> torch.nn.Module:
    """The router beside an experts module: `gate` or `router` of the same block."""
    block = model.get_submodule(layer.name.rpartition(".")[0])
    (found,) = [child for name, child in block.named_children() if name in ("gate", "router")]
    return found


def _selected(router: torch.nn.Module, output: Any) -> torch.Tensor:
    """int64 [rows, k] experts that a router chose, E for none."""
    kind = type(router).__name__
    if kind.startswith("SwitchTransformers"):
        one_hot = output[0].reshape(-1, EXPERTS)
        return torch.where(one_hot.sum(-1) > 0, one_hot.argmax(-1), EXPERTS)[:, None]
    if kind.startswith("Zaya"):
        # Class E means no expert at all; the router then returns expert 0 with weight 0.
        scores = torch.softmax(output[0], -1) + router.balancing_biases
        return scores.topk(router.top_k, -1).indices
    return output[2].reshape(-1, output[2].shape[-1])


class RouterLog:
    """Selections of each router, call by call.

    Attributes:
        calls: layer -> list of int64 [rows, k].
    """

    def __init__(self, layers: int) -> None:
        self.calls: list[list[torch.Tensor]] = [[] for _ in range(layers)]

    def counts(self, mask: torch.Tensor | None = None) -> np.ndarray:
        """int64 [L, E]. Selections of real rows; a call of other than the mask's size has no padding."""
        out = np.zeros((len(self.calls), EXPERTS), dtype=np.int64)
        for layer, calls in enumerate(self.calls):
            for index in calls:
                real = torch.ones(len(index), dtype=torch.bool)
                if mask is not None and mask.numel() == len(index):
                    real = mask.reshape(-1).bool()
                for expert in index[real].reshape(-1).tolist():
                    if expert < EXPERTS:
                        out[layer, expert] += 1
        return out


@contextmanager
def reading_routers(model: PreTrainedModel) -> Iterator[RouterLog]:
    """Record what each router returns inside the block."""
    layers = find_layers(model)
    log = RouterLog(len(layers))

    def recorder(row: int) -> Callable[..., None]:
        def hook(router: torch.nn.Module, inputs: Any, output: Any) -> None:
            log.calls[row].append(_selected(router, output))

        return hook

    handles = [router_of(model, layer).register_forward_hook(recorder(i)) for i, layer in enumerate(layers)]
    try:
        yield log
    finally:
        for handle in handles:
            handle.remove()


def make_plan(model: PreTrainedModel, slots_of: Callable[[int], list[Slot]]) -> Plan:
    """A plan by hand.

    Args:
        model: what it is for.
        slots_of: row of the layer -> its slots, in any order.
    """
    layers = find_layers(model)
    plans = []
    original = planned = 0
    for row, layer in enumerate(layers):
        slots = sorted(slots_of(row), key=lambda s: (s.expert, s.precision != "original"))
        plans.append(LayerPlan(layer.layer_id, layer.name, layer.num_experts, tuple(slots)))
        original += layer.num_experts * slot_bytes(layer.layout, "original")
        planned += sum(slot_bytes(layer.layout, slot.precision) for slot in slots)
    identity = ModelIdentity(
        name="tiny",
        model_type=model.config.model_type,
        num_layers=len(layers),
        num_experts=layers[0].num_experts,
        top_k=2,
        dtype=str(layers[0].layout.dtype).removeprefix("torch."),
    )
    return Plan(identity, "", "test", 0, Budget(original, max(original, planned), planned), 1, tuple(plans))


def identity_slots(row: int) -> list[Slot]:
    """One slot an expert, original precision."""
    return [Slot(e) for e in range(EXPERTS)]


def replica_slots(row: int) -> list[Slot]:
    """1 to 3 original slots an expert, different in each layer; the shares of expert 1 are unequal."""
    slots = []
    for e in range(EXPERTS):
        r = 1 + (e + row) % 3
        shares = [0.75, 0.25] if e == 1 and r == 2 else [1 / r] * r
        slots += [Slot(e, share=share) for share in shares]
    return slots


def mixed_slots(row: int) -> list[Slot]:
    """Every precision: experts 0 to 3 in int8, 4 in float16, 5 in both beside the original, the rest original."""
    slots = [Slot(e, "int8") for e in range(4)] + [Slot(4, "float16"), Slot(6), Slot(7)]
    return [*slots, Slot(5, share=0.5), Slot(5, "int8", share=0.25), Slot(5, "float16", share=0.25)]


def is_routed(name: str, layers: list[MoELayer]) -> bool:
    """Whether a parameter belongs to the routed experts of a layer."""
    return any(
        name.startswith(f"{layer.name}.") and layer.layout.is_expert_weight(name.removeprefix(f"{layer.name}."))
        for layer in layers
    )
