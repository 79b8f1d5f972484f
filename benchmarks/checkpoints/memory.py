"""Memory that a checkpoint needs, from its config.json alone: no weight is read.

    python benchmarks/checkpoints/memory.py                    # the configurations in configs/
    python benchmarks/checkpoints/memory.py DIRECTORY...       # any model with a config.json

The model is built on the meta device and its parameters are counted. With b bytes a value in the checkpoint's dtype:

    weights = b * parameters                            held to profile and to evaluate; also the size on disk
    experts = b * parameters of routed experts          what a plan's budget is about
    layer   = b * routed experts of one layer           held to write a balanced checkpoint, twice, and one shard

Activations, and at most one layer more while experts are fused on loading, come on top and are not counted.
The last line is one JSON object, sizes in bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from equipoise.models import empty_model, find_layers
from equipoise.models.loading import find_source

CONFIGS = Path(__file__).parent / "configs"


def memory(directory: Path) -> dict[str, Any]:
    """Parameters and bytes of the model that a directory's config.json describes."""
    model = empty_model(find_source(directory))
    layers = find_layers(model)
    each = [sum(p.numel() for p in layer.experts.parameters()) for layer in layers]
    parameters = sum(p.numel() for p in model.parameters())
    size = torch.empty((), dtype=layers[0].layout.dtype).element_size()
    return {
        "model": directory.name,
        "model_type": model.config.model_type,
        "dtype": str(layers[0].layout.dtype).removeprefix("torch."),
        "moe_layers": len(layers),
        "experts": layers[0].num_experts,
        "parameters": parameters,
        "weights": size * parameters,
        "expert_weights": size * sum(each),
        "layer": size * max(each),
    }


def main() -> None:
    """Print a line a checkpoint, then all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="*", type=Path, metavar="DIRECTORY")
    directories = parser.parse_args().directories or sorted(CONFIGS.iterdir())
    rows = [memory(directory) for directory in directories]
    print(f"{'model':<24} {'dtype':<9} {'MoE layers':>10} {'experts':>8} {'parameters':>15} ", end="")
    print(f"{'weights GiB':>11} {'experts GiB':>11} {'layer GiB':>9}")
    for row in rows:
        sizes = [row[key] / 2**30 for key in ("weights", "expert_weights", "layer")]
        print(f"{row['model']:<24} {row['dtype']:<9} {row['moe_layers']:>10} {row['experts']:>8} ", end="")
        print(f"{row['parameters']:>15,} {sizes[0]:>11.2f} {sizes[1]:>11.2f} {sizes[2]:>9.2f}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
