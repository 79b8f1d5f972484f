"""`equipoise import`: an engine's expert statistics as a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from equipoise.cli import console
from equipoise.cli.dataclass_options import options_of, take
from equipoise.exchange import IMPORTERS, ImportOptions, import_statistics
from equipoise.files import require_destination, save_profile
from equipoise.metrics import lis


@click.command("import")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
@click.option("--from", "engine", required=True, type=click.Choice(list(IMPORTERS)), help="The engine.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The profile to write (.npz).")
@options_of(ImportOptions)
@click.option("--force", is_flag=True, help="Replace an existing file.")
def command(files: tuple[Path, ...], engine: str, out: Path, force: bool, **values: Any) -> None:
    """Turn an engine's expert statistics into a profile.

    \b
    sglang  .pt files of /dump_expert_distribution_record (all ranks of one recording), or their directory
    trtllm  the directory of EXPERT_STATISTIC_PATH
    vllm    completion responses (.json, .jsonl) of a server with --enable-return-routed-experts

    \b
      equipoise import expert_statistic --from trtllm --out P.npz
      equipoise plan P.npz --replicas 8 --ranks 4 --out plan.json
    """
    options = take(ImportOptions, values)
    require_destination(out, force)
    with console.progress() as track:
        done = import_statistics(files, engine, options, track)
    profile = done.profile
    save_profile(profile, out)
    score = lis(profile.counts)
    console.table(
        f"statistics of {engine}",
        ("layer", "selections", "experts used", "LIS"),
        [
            (layer, f"{n.sum():,}", f"{np.count_nonzero(n)} of {len(n)}", f"{value:.3f}")
            for layer, n, value in zip(profile.layer_ids, profile.counts, score, strict=True)
        ],
    )
    for line in done.notes:
        console.note(f"note: {line}")
    console.last_line(
        {
            "engine": engine,
            "file": str(out),
            "layers": profile.num_layers,
            "experts": profile.num_experts,
            "top_k": profile.meta["top_k"],
            "tokens": profile.meta["tokens"],
            "steps": profile.meta["steps"],
            "windows": 1 if profile.series is None else len(profile.series),
            "selections": int(profile.counts.sum()),
            "lis": float(score.mean()),
        }
    )
