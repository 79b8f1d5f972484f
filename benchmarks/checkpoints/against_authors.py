"""The native classes beside the authors' own code, on the same random weights in the published layout.

    python benchmarks/checkpoints/against_authors.py deepseek MODELING_FILE CONFIGURATION_FILE
    python benchmarks/checkpoints/against_authors.py llama_moe MODELING_FILE CONFIGURATION_FILE

The files are `modeling_deepseek.py` and `configuration_deepseek.py` of `deepseek-ai/deepseek-moe-16b-base`, or
`modeling_llama_moe_hf.py` and `configuration_llama_moe.py` of a LLaMA-MoE checkpoint. They are not part of this
repository, and are run from a temporary directory: read them first. They were written for transformers 4; what they
import and transformers 5 has no longer is given to them here, as far as a forward without cache needs it.

Prints the largest difference of the logits of real tokens (one row is padded on the right), in float32 and bfloat16,
with transformers' plain loop over the experts. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers.pytorch_utils
import transformers.utils.import_utils
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import equipoise

sys.path.append(str(Path(__file__).parents[2] / "tests" / "native"))
from native_reference import random_state

_SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
_FIXED = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "attention_bias": False, "attention_dropout": 0.0}
_COMMON: dict[str, Any] = _SIZES | _FIXED | {"hidden_act": "silu", "pretraining_tp": 1, "pad_token_id": 0}
_COMMON |= {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128, "initializer_range": 0.02}
CASES: dict[str, list[dict[str, Any]]] = {
    "deepseek": [
        _COMMON
        | {
            "num_hidden_layers": layers,
            "intermediate_size": 96,
            "moe_intermediate_size": 24,
            "n_routed_experts": experts,
        }
        | {"num_experts_per_tok": k, "n_shared_experts": shared, "first_k_dense_replace": first}
        | {"moe_layer_freq": every, "norm_topk_prob": norm, "scoring_func": "softmax"}
        | {"aux_loss_alpha": 0.001, "seq_aux": True}
        for layers, experts, k, shared, first, every, norm in ((4, 64, 6, 2, 1, 1, False), (5, 16, 3, None, 0, 2, True))
    ],
    "llama_moe": [
        _COMMON
        | {"num_hidden_layers": 3, "intermediate_size": 192, "num_experts": experts, "num_selects": k}
        | {"gate_network": gate, "gate_use_softmax": gate == "mlp", "gate_add_noise": gate == "mlp"}
        | {"multiply_gate_scores": True, "score_scale_factor": 4.0, "size_experts": None}
        for experts, k, gate in ((8, 2, "mlp"), (16, 4, "mlp"), (8, 2, "linear"))
    ],
}


def _old_names() -> None:
    """What the authors' code imports of transformers 4."""
    old: dict[Any, dict[str, Any]] = {
        transformers.pytorch_utils: {"ALL_LAYERNORM_LAYERS": [], "is_torch_greater_or_equal_than_1_13": True},
        transformers.utils.import_utils: {"is_torch_fx_available": lambda: False},
        transformers.utils: {
            "is_flash_attn_greater_or_equal_2_10": lambda: False,
            "add_start_docstrings": lambda *_, **__: lambda f: f,
            "add_start_docstrings_to_model_forward": lambda *_, **__: lambda f: f,
            "replace_return_docstrings": lambda *_, **__: lambda f: f,
        },
    }
    for module, names in old.items():
        for name, value in names.items():
            if not hasattr(module, name):
                setattr(module, name, value)


def _theirs(modeling: Any, configuration: Any, values: dict[str, Any]) -> Any:
    """The authors' model, float32, weights as they come."""
    (config_class,) = (c for n, c in vars(configuration).items() if n in ("DeepseekConfig", "LlamaMoEConfig"))
    (model_class,) = (c for n, c in vars(modeling).items() if n in ("DeepseekForCausalLM", "LlamaMoEForCausalLM"))
    for cls in vars(modeling).values():
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls is not PreTrainedModel:
            cls.post_init = lambda self: None  # type: ignore[method-assign]
    model_class._tied_weights_keys = None
    config = config_class()
    for name, value in (values | {"rope_scaling": None, "use_cache": False}).items():
        object.__setattr__(config, name, value)  # transformers 5 would turn rope_theta into something else
    config._attn_implementation_internal = "eager"
    return model_class(config).eval()


def difference(modeling: Any, configuration: Any, family: str, values: dict[str, Any], dtype: torch.dtype) -> float:
    """Largest difference of the logits of real tokens."""
    values = values | {"model_type": family}
    state = random_state(values)
    theirs = _theirs(modeling, configuration, values)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    # transformers 4.31 kept the frequencies of the rotary embedding with the weights, later versions do not.
    if [key for key in [*missing, *unexpected] if "inv_freq" not in key]:
        raise SystemExit(f"the weights do not fit the authors' model: missing {missing}, unexpected {unexpected}")
    for parameter in theirs.parameters():
        parameter.data = parameter.data.to(dtype)  # not the buffers: from_pretrained leaves them in float32
    with tempfile.TemporaryDirectory() as folder:
        save_file(state, Path(folder) / "model.safetensors", {"format": "pt"})
        (Path(folder) / "config.json").write_text(json.dumps(values), encoding="utf-8")
        ours = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    ours.set_experts_implementation("eager")
    ids = torch.randint(3, 120, (4, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True).logits
        found = ours(input_ids=ids, attention_mask=mask).logits
    return float((found - wanted)[mask.bool()].abs().max())


def main() -> None:
    """Compare, print a line a case, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=CASES)
    parser.add_argument("files", nargs=2, type=Path, metavar="FILE", help="modeling and configuration")
    arguments = parser.parse_args()
    _old_names()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "authors_code"
        package.mkdir()
        (package / "__init__.py").touch()
        for file in arguments.files:
            shutil.copy(file, package)
        sys.path.insert(0, folder)
        modeling, configuration = (importlib.import_module(f"authors_code.{file.stem}") for file in arguments.files)
        for number, values in enumerate(CASES[arguments.family]):
            for dtype in (torch.float32, torch.bfloat16):
                found = difference(modeling, configuration, arguments.family, values, dtype)
                rows.append({"case": number, "dtype": str(dtype).removeprefix("torch."), "max_abs_diff": found})
                print(f"{arguments.family} case {number} {rows[-1]['dtype']:<9} largest difference {found:.3g}")
    print(json.dumps({"family": arguments.family, "equipoise": equipoise.__version__, "cases": rows}))


if __name__ == "__main__":
    main()
