"""The small Switch Transformer: transformers' own class, 4 + 4 layers, every second one sparse, top-1.

    d_model 96, 4 heads of 24, d_ff 256, relu, tied embeddings of 6,144 entries
    sparse: layers 1 and 3 of the encoder and of the decoder, 8 or 16 experts

The balancing loss has the weight of the Switch paper (section 2.2), 0.01; the z-loss that of transformers, 0.001.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from text import END, PAD, VOCABULARY
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

EXPERTS = (8, 16)


def config(experts: int, vocabulary: int = VOCABULARY, **changes: Any) -> SwitchTransformersConfig:
    """Configuration of the small model with `experts` experts a sparse layer."""
    values = {
        "vocab_size": vocabulary, "d_model": 96, "d_kv": 24, "num_heads": 4, "d_ff": 256,
        "num_layers": 4, "num_decoder_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2,
        "num_experts": experts, "expert_capacity": 64, "dropout_rate": 0.1, "router_aux_loss_coef": 0.01,
        "router_z_loss_coef": 0.001, "pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD,
    }  # fmt: skip
    return SwitchTransformersConfig(**{**values, **changes})


def new_model(settings: SwitchTransformersConfig, seed: int) -> Any:
    """The model with fresh weights.

    Routers start at a thousandth of transformers' variance: its own start (deviation 1) gives logits of deviation
    `sqrt(d_model)`, so that every token would choose one expert with certainty before anything is learnt.
    """
    torch.manual_seed(seed)
    model = SwitchTransformersForConditionalGeneration(settings)
    for module in model.modules():
        if type(module).__name__ == "SwitchTransformersTop1Router":
            torch.nn.init.normal_(module.classifier.weight, std=settings.d_model**-0.5)
    return model


def split_experts(weights: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Weights of a model with twice the experts: each expert becomes two, and the router parts its tokens.

    A router's row w becomes w + n and w - n, n random at a quarter of the row's length, so that a token goes to one
    of the two by the sign of its product with n. The gate of a token falls to about a half, because its probability is
    shared by two; the second matrix of an expert is doubled for that.

    Args:
        weights: of a model with E experts, by the names of transformers.
        seed: draws the directions.
    """
    random = torch.Generator().manual_seed(seed)
    experts = next(len(weight) for name, weight in weights.items() if name.endswith("router.classifier.weight"))
    out: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        expert = re.search(r"expert_(\d+)\.", name)
        if name.endswith("router.classifier.weight"):
            drawn = torch.randn(weight.shape, generator=random)
            part = drawn / drawn.norm(dim=1, keepdim=True) * weight.norm(dim=1, keepdim=True) / 4
            out[name] = torch.cat([weight + part, weight - part])
        elif expert is None:
            out[name] = weight
        else:
            value = weight * 2 if name.endswith("wo.weight") else weight
            out[name] = value
            out[name.replace(f"expert_{expert[1]}.", f"expert_{int(expert[1]) + experts}.")] = value.clone()
    return out
