"""`equipoise profile`: load and importance of a model's experts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from equipoise.cli import console
from equipoise.cli.dataclass_options import options_of, take
from equipoise.errors import InputError
from equipoise.options import ProfileOptions


@click.command(name="profile")
@click.argument("model")
@click.option("--data", multiple=True, type=click.Path(path_type=Path), help="Calibration text: .jsonl(.gz) or .txt.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Profile to write (.npz).")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@options_of(ProfileOptions)
def command(model: str, data: tuple[Path, ...], out: Path, force: bool, **values: Any) -> None:
    """Measure load and importance of MODEL's experts on calibration text.

    MODEL is a local directory, a hub id, or `demo` (the bundled model, whose text is the default --data).

    \b
    Examples:
      equipoise profile demo --out demo.npz
      equipoise profile ./my-moe --data calibration.jsonl --out my-moe.npz
    """
    began = time.monotonic()
    options = take(ProfileOptions, values)
    from equipoise.demo import calibration_text
    from equipoise.evaluation.data import batches, windows
    from equipoise.files import require_destination, save_profile
    from equipoise.files.text import read_texts
    from equipoise.metrics import lis
    from equipoise.models.loading import DEMO, empty_model, find_source, load_model, load_tokenizer
    from equipoise.pipeline.text import thin
    from equipoise.profiling import profile as measure

    require_destination(out, force)
    source = find_source(model)
    require_destination(out, force, [source.path, *data])
    if not data:
        if source.name != DEMO:
            raise InputError("no calibration text: give --data FILE (.jsonl, .jsonl.gz with a text field, or .txt)")
        data = (calibration_text(),)
    empty_model(source)
    cut = windows(load_tokenizer(source), read_texts(data), options.seq_len)
    chosen = thin(cut, options.seq_len, fraction=options.fraction, max_tokens=options.max_tokens)
    network = load_model(source.name, tokenizer=False).model
    with console.progress() as track:
        found = measure(
            network,
            batches(chosen, options.batch_size, network.config),
            options,
            track=track,
            model_name=source.name,
            data=", ".join(path.name for path in data),
        )
    save_profile(found, out)
    score = lis(found.counts)
    console.table(
        f"Load of {source.name} on {found.meta['tokens']:,} tokens (LIS: 1 is perfect balance)",
        ("layer", "LIS", "heavy hitter", "its share", "least loaded", "its share"),
        [
            (
                layer,
                f"{score[i]:.3f}",
                int(n.argmax()),
                f"{n.max() / n.sum():.2%}",
                int(n.argmin()),
                f"{n.min() / n.sum():.2%}",
            )
            for i, (layer, n) in enumerate(zip(found.layer_ids, found.counts, strict=True))
        ],
    )
    console.last_line(
        {
            "out": str(out),
            "model": source.name,
            "layers": found.num_layers,
            "experts": found.num_experts,
            "top_k": found.top_k,
            "tokens": found.meta["tokens"],
            "lis": float(np.mean(score)),
            "importance": sorted(found.importance),
            "seconds": time.monotonic() - began,
        }
    )
