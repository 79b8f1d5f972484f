"""Where training starts: routers from clusters of what the dense model feeds its FFNs, and the neurons experts keep."""

from __future__ import annotations

from pathlib import Path

import data
import numpy as np
import torch
from model import Upcycled
from neurons import kept, usage
from recipe import Options
from routers import start_router
from safetensors.torch import load_file, save_file

from equipoise.errors import InputError
from equipoise.files.atomic import atomic_file


def start(model: Upcycled, tokens: dict[str, np.ndarray], options: Options, fresh: bool) -> None:
    """From what the dense model feeds its FFNs: set every layer's router by clusters, and the neurons experts keep.

    Args:
        model: gets both.
        tokens: from `prepare`.
        options: of the run.
        fresh: set the routers; otherwise they stay as they are.
    """
    rows = [
        data.training_window(tokens[f"{stream}.train"], options.length, n, (options.seed, 99, i))
        for i, stream in enumerate(data.STREAMS)
        for n in range(options.router_windows)
    ]
    seen: list[list[torch.Tensor]] = []
    for part in torch.from_numpy(np.stack(rows)).to(model.embedding.device).split(8):
        inputs: list[torch.Tensor] = []
        model.dense(part, inputs)
        seen.append(inputs)
    labels = np.repeat(np.arange(len(data.STREAMS)), options.router_windows * options.length)
    for number, layer in enumerate(model.layers):
        x = torch.cat([inputs[number] for inputs in seen])
        if fresh:
            rng = np.random.default_rng([options.seed, number])
            router = start_router(
                x.float().cpu().numpy(), labels, options.experts, rng, options.gamma, sharpness=options.sharpness
            )
            layer.router.data.copy_(torch.from_numpy(router))
        if options.drop:
            used = usage(x, layer.router.detach(), layer.base_in, layer.base_out, options.top_k)
            layer.keep.copy_(kept(used, options.drop))


def fresh_start(model: Upcycled, tokens: dict[str, np.ndarray], work: Path, options: Options) -> None:
    """`start` with new routers, kept in `work` with what it depends on.

    Raises:
        InputError: what is kept there was made with other options.
    """
    path = work / "start.safetensors"
    made_with = torch.tensor(
        [options.experts, options.top_k, options.router_windows, options.seed, round(1e6 * options.drop)]
    )
    if not path.exists():
        start(model, tokens, options, fresh=True)
        kept_here = {"made_with": made_with}
        for number, layer in enumerate(model.layers):
            kept_here[f"{number}.router"] = layer.router.detach().cpu()
            kept_here[f"{number}.keep"] = layer.keep.cpu()
        with atomic_file(path) as partial:
            save_file(kept_here, partial)
    found = load_file(path)
    if not torch.equal(found["made_with"], made_with):
        raise InputError(f"{path} was made with other --experts, --top-k, --drop or seed: delete it, or change --work")
    with torch.no_grad():
        for number, layer in enumerate(model.layers):
            layer.router.copy_(found[f"{number}.router"])
            layer.keep.copy_(found[f"{number}.keep"])
