"""The scripts of benchmarks/paper, and small counts to try them."""

import numpy as np
from script_modules import import_scripts

from equipoise.types import Profile

scripts = import_scripts(
    "paper", "ablation", "batches", "counted", "gaps", "prompts", "samples", "sections", "streams", "traces"
)


def prompt_counts(number: int = 40, layers: int = 3, experts: int = 8, seed: int = 0, skew: float = 1.0) -> np.ndarray:
    """int64 [number, layers, experts] of prompts of 5 to 30 tokens, 2 experts each, of one popularity."""
    draw = np.random.default_rng(seed)
    popularity = draw.dirichlet(np.full(experts, 1 / skew), layers)
    tokens = draw.integers(5, 30, number)
    return np.stack([[draw.multinomial(2 * t, p) for p in popularity] for t in tokens]).astype(np.int64)


def template(layers: int = 3, experts: int = 8) -> Profile:
    """A profile with sizes, importance and nothing else of interest."""
    shape = (layers, experts)
    importance = np.random.default_rng(1).random(shape).astype(np.float32)
    return Profile(
        np.ones(shape, dtype=np.int64),
        np.arange(layers),
        {"model": "tiny", "model_type": "mixtral", "top_k": 2, "dtype": "bfloat16"},
        layer_names=tuple(f"model.layers.{i}.mlp.experts" for i in range(layers)),
        importance={"wanda": importance, "error": importance},
        expert_bytes={"original": np.full(shape, 2000), "int8": np.full(shape, 1010)},
    )


def tasks(number: int = 40, experts: int = 8) -> dict[str, np.ndarray]:
    """Counts of every task, each with a popularity of its own."""
    return {task: prompt_counts(number, experts=experts, seed=i) for i, task in enumerate(scripts.prompts.TASKS)}
