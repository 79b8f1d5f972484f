"""`equipoise import`: an engine's expert statistics as a profile."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from equipoise.cli import console
from equipoise.exchange import IMPORTERS, ImportOptions, import_statistics
from equipoise.files import require_destination, save_profile
from equipoise.metrics import lis

_DEFAULTS = ImportOptions()


@click.command("import")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
@click.option("--from", "engine", required=True, type=click.Choice(list(IMPORTERS)), help="The engine.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The profile to write (.npz).")
@click.option(
    "--windows",
    type=int,
    default=_DEFAULTS.windows,
    show_default=True,
    help="Pool adjacent steps to at most this many windows (0 = keep every step).",
)
@click.option("--top-k", type=int, default=_DEFAULTS.top_k, help="Experts a token selects, where the files do not say.")
@click.option("--num-experts", type=int, default=_DEFAULTS.num_experts, help="Experts a layer (vllm does not say).")
@click.option("--model", default=_DEFAULTS.model, help="Name of the model, for the record.")
@click.option("--model-type", default=_DEFAULTS.model_type, help="As in the model's config.json, for the record.")
@click.option("--dtype", default=_DEFAULTS.dtype, help="Of the expert weights, for the record.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def command(
    files: tuple[Path, ...],
    engine: str,
    out: Path,
    windows: int,
    top_k: int | None,
    num_experts: int | None,
    model: str,
    model_type: str,
    dtype: str,
    force: bool,
) -> None:
    """Turn an engine's expert statistics into a profile.

    \b
    sglang  .pt files of /dump_expert_distribution_record (all ranks of one recording), or their directory
    trtllm  the directory of EXPERT_STATISTIC_PATH
    vllm    completion responses (.json, .jsonl) of a server with --enable-return-routed-experts

    \b
      equipoise import expert_statistic --from trtllm --out P.npz
      equipoise plan P.npz --replicas 8 --ranks 4 --out plan.json
    """  # noqa: D301
    options = ImportOptions(windows, top_k, num_experts, model, model_type, dtype)
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
