"""Families that transformers does not have: DeepSeek-MoE (`deepseek`) and LLaMA-MoE (`llama_moe`).

Both are on the hub as remote code for transformers 4. Here they are Llama with another feed-forward block: attention,
norms and rotary embedding are transformers' own, the experts go through its experts interface, and their published
weight names through its conversion rules. So everything that equipoise does with another family it does with these,
and they save under their published names again.

`import equipoise` is all that plain `AutoModelForCausalLM.from_pretrained(directory)` needs: the configurations are
registered with transformers' Auto classes as soon as these are imported (`imports`), and a configuration brings its
model class when the first one is built. Without `import equipoise`, `register()` here does the same. Remote code is
never run, not with `trust_remote_code=True` either: transformers prefers a registered class.

For inference: the noise on the gates and the losses that train them are left out.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Teach transformers' `AutoConfig` and `AutoModelForCausalLM` the families; a second call changes nothing."""
    from transformers import AutoConfig

    from equipoise.native.configurations import CONFIGURATIONS

    for config in CONFIGURATIONS:
        AutoConfig.register(config.model_type, config, exist_ok=True)
