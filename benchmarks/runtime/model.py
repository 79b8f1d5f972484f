"""A random OLMoE-like model of 1.7 GB whose experts are as unevenly loaded as those of a trained one.

    python benchmarks/runtime/model.py [--work DIR]

transformers' own Olmoe class, bf16: 8 layers of 64 experts, top-8, hidden 1024, intermediate 512; the tokenizer and
vocabulary of the bundled demo model, so that the bundled text serves as input. It is written once to
DIR/<name with its sizes> and found there again. No training: what it computes means nothing, what it costs does.

Where the imbalance comes from: every token embedding is noise of size 1 and `common` times one direction u that all
tokens share, so the router inputs have it in common too, and the rows of a router lean on u by chance:

    embedding[t] = noise[t] + common * sqrt(H) * u        logit[e] = spread * g[e] . h / sqrt(H),  g[e] ~ N(0, I)

What a layer adds to the stream is scaled by 1 / sqrt(2 L), as in GPT-2, or the common part would grow from layer to
layer. `common` was chosen by measuring the mean LIS on the bundled text: 0 gives 1.5, 0.2 gives 2.2, 0.3 gives 2.8 (the
frequent tokens of real text do the rest); the command measures it again. The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from timing import script
from transformers import OlmoeConfig, OlmoeForCausalLM

import equipoise as eq
from equipoise.cli import console
from equipoise.demo import calibration_text, model_dir
from equipoise.evaluation.data import Batch, batches, windows
from equipoise.files.atomic import atomic_directory
from equipoise.files.text import read_texts
from equipoise.models import load_model
from equipoise.models.loading import LoadedModel, find_source, load_tokenizer, progress_bars

FORM = 1
"""Counts up when the weights are made differently, so that no older model is found under the name."""


@dataclass(frozen=True)
class Sizes:
    """H hidden, I intermediate, E experts, k a token selects, L layers."""

    hidden: int = 1024
    intermediate: int = 512
    experts: int = 64
    top_k: int = 8
    layers: int = 8
    spread: float = 1.5
    common: float = 0.25
    seed: int = 0

    @property
    def name(self) -> str:
        """Directory name: everything the weights depend on."""
        return (
            f"olmoe-h{self.hidden}-i{self.intermediate}-e{self.experts}k{self.top_k}-l{self.layers}"
            f"-{self.spread:g}-{self.common:g}-seed{self.seed}-form{FORM}"
        )


def default_work() -> Path:
    """Where the model is kept unless said otherwise."""
    return Path(tempfile.gettempdir()) / "equipoise-runtime"


def olmoe_like(directory: Path | None = None, sizes: Sizes | None = None) -> Path:
    """The model's directory, in Hugging Face layout; written on the first call (half a minute, 1.7 GB).

    Args:
        directory: to keep it in; None: `default_work()`.
        sizes: other sizes than the default.
    """
    sizes = sizes or Sizes()
    path = Path(directory or default_work()) / sizes.name
    if path.is_dir():
        return path
    tokenizer = load_tokenizer(find_source(model_dir()))
    model = random_model(sizes, len(tokenizer))
    with atomic_directory(path) as partial, progress_bars(shown=False):
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return path


@torch.no_grad()
def random_model(sizes: Sizes, vocabulary: int, device: torch.device | str = "cpu") -> OlmoeForCausalLM:
    """The model in memory, bf16; another device draws other numbers."""
    config = OlmoeConfig(
        vocab_size=vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(1, sizes.hidden // 64),
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
        max_position_embeddings=4096,
        initializer_range=sizes.hidden**-0.5,  # each projection keeps the size of its input
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )
    gpus = [] if torch.device(device).type == "cpu" else [torch.device(device)]
    with torch.random.fork_rng(devices=gpus), torch.device(device):
        torch.manual_seed(sizes.seed)
        model = OlmoeForCausalLM._from_config(config, dtype=torch.bfloat16)
        hidden = sizes.hidden
        common = torch.nn.functional.normalize(torch.randn(hidden), dim=0)
        embedding = model.get_input_embeddings().weight
        embedding.copy_(torch.randn(embedding.shape) + sizes.common * hidden**0.5 * common)
        for layer in model.model.layers:
            layer.mlp.gate.weight.copy_(sizes.spread * hidden**-0.5 * torch.randn(sizes.experts, hidden))
            for last in (layer.self_attn.o_proj.weight, layer.mlp.experts.down_proj):
                last.mul_((2 * sizes.layers) ** -0.5)
    return model.eval()


def text_batches(loaded: LoadedModel, rows: int, length: int, count: int) -> list[Batch]:
    """The first `count` batches [rows, length] of the bundled calibration text."""
    cut = windows(loaded.tokenizer, read_texts([calibration_text()]), length)
    return batches([w for w in cut if len(w.input_ids) == length][: rows * count], rows, loaded.model.config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help=f"directory to keep it in (default: {default_work()})")
    arguments = parser.parse_args()
    path = olmoe_like(arguments.work)
    loaded = load_model(path)
    sizes = [p.numel() * p.element_size() for p in loaded.model.parameters()]
    with torch.no_grad(), eq.watch(loaded.model) as load:
        for batch in text_batches(loaded, 4, 256, 4):
            loaded.model(**batch, use_cache=False)
    lis = eq.lis(load.counts)
    idle = (load.counts == 0).sum(1)
    console.table(
        f"{path}: {sum(sizes) / 2**30:.2f} GiB; load on 4,096 tokens of the bundled text",
        ("layer", "LIS", "experts never selected"),
        [(i, f"{value:.2f}", f"{none}") for i, (value, none) in enumerate(zip(lis, idle, strict=True))],
    )
    console.last_line({"path": str(path), "bytes": sum(sizes), "lis": lis.mean(), "lis_by_layer": lis, "idle": idle})


if __name__ == "__main__":
    script(main)
