"""`equipoise balance`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from equipoise.cli import console
from equipoise.cli.dataclass_options import options_of, take
from equipoise.options import PlanOptions, ProfileOptions
from equipoise.pipeline.balance import BalanceOptions, BalanceResult, balance


@click.command(name="balance")
@click.argument("model", required=False)
@click.option("--data", multiple=True, type=click.Path(path_type=Path), help="Calibration text: .jsonl(.gz) or .txt.")
@click.option(
    "--heldout", multiple=True, type=click.Path(path_type=Path), help="Text to score on; else part of --data."
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("equipoise-run"), show_default=True, help="Run directory."
)
@click.option("--force", is_flag=True, help="Replace an existing run directory.")
@options_of(BalanceOptions)
@options_of(PlanOptions, leave_out=("expert_bytes", "slots", "nodes", "group_limited"))
@options_of(ProfileOptions)
def command(
    model: str | None, data: tuple[Path, ...], heldout: tuple[Path, ...], out: Path, force: bool, **values: Any
) -> None:
    """Balance MODEL end to end and prove it.

    Profiles load and importance on calibration text, plans replicas and precision under the byte budget, applies the
    plan, saves the checkpoint, loads it again in a fresh process, compares perplexity and load on held-out text, and
    writes report.html. MODEL is a local directory or a hub id; without it, the bundled demo model and text are used.

    \b
    Examples:
      equipoise balance --out run
      equipoise balance --preset paper --out run-paper
      equipoise balance allenai/OLMoE-1B-7B-0924 --data calibration.jsonl --budget 1.0 --out run-olmoe
    """
    options = take(BalanceOptions, values)
    plan_options, profile_options = take(PlanOptions, values), take(ProfileOptions, values)
    with console.progress() as track:
        result = balance(
            model,
            out,
            data=data,
            heldout=heldout,
            options=options,
            profile_options=profile_options,
            plan_options=plan_options,
            force=force,
            track=track,
        )
    show(result)
    console.note(f"report: {out / 'report.html'}")
    console.last_line(result.metrics.summary.model_dump())


def show(result: BalanceResult) -> None:
    """The tables for people."""
    summary = result.metrics.summary
    console.table(
        "Balance and memory by layer (LIS on held-out text: 1 is perfect; MiB of expert tensors)",
        ("layer", "LIS before", "LIS after", "MiB before", "MiB after", "replicas", "quantized", "tokens on low slots"),
        [
            (
                layer.layer,
                f"{layer.lis_before:.3f}",
                f"{layer.lis_after:.3f}",
                f"{layer.bytes_before / 2**20:.2f}",
                f"{layer.bytes_after / 2**20:.2f}",
                layer.replicas,
                layer.quantized,
                f"{layer.tokens_quantized:.1%}",
            )
            for layer in result.metrics.layers
        ],
        (
            "all",
            f"{summary.lis_before:.3f}",
            f"{summary.lis_after:.3f}",
            f"{summary.bytes_before / 2**20:.2f}",
            f"{summary.bytes_after / 2**20:.2f}",
            summary.replicas,
            summary.quantized,
            f"{summary.tokens_quantized:.1%}",
        ),
    )
    console.table(
        "Perplexity on held-out text (paired 95 % interval of the change)",
        ("domain", "before", "after", "change %", "95 % interval %", "tokens"),
        [
            (
                row.domain,
                f"{row.before:.3f}",
                f"{row.after:.3f}",
                f"{row.delta_pct:+.3f}",
                "one window" if row.ci95 is None else f"{row.ci95[0]:+.3f} to {row.ci95[1]:+.3f}",
                f"{row.tokens:,}",
            )
            for row in result.metrics.perplexity
        ],
    )
