"""`equipoise apply`: a balanced checkpoint from a model and a plan."""

from __future__ import annotations

import time
from pathlib import Path

import click

from equipoise.cli import console


@click.command(name="apply")
@click.argument("model")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Checkpoint directory to write.")
@click.option("--force", is_flag=True, help="Replace an existing directory.")
def command(model: str, plan: Path, out: Path, force: bool) -> None:
    """Write MODEL balanced by PLAN to a checkpoint directory, shard by shard.

    The whole model is never in memory. The result loads with plain from_pretrained after `import equipoise`, and
    is refused by transformers without it.

    \b
    Example:
      equipoise profile demo --out demo.npz
      equipoise plan demo.npz --out plan.json
      equipoise apply demo plan.json --out demo-balanced
    """
    began = time.monotonic()
    from equipoise.checkpoint import apply_checkpoint
    from equipoise.files import load_plan

    made = load_plan(plan)
    with console.progress() as track:
        written = apply_checkpoint(model, made, out, force=force, track=track)
    totals: dict[str, int] = {}
    for sizes in written.values():
        for precision, amount in sizes.items():
            totals[precision] = totals.get(precision, 0) + amount
    console.table(
        f"Expert tensors written to {out}",
        ("precision", "MiB"),
        [(precision, f"{amount / 2**20:.2f}") for precision, amount in totals.items()],
    )
    console.last_line(
        {
            "out": str(out),
            "layers_changed": len(written),
            "bytes_written": totals,
            "bytes_plan": made.budget.plan_bytes,
            "bytes_original": made.budget.original_bytes,
            "replicas": made.num_replicas,
            "quantized": made.num_quantized,
            "seconds": time.monotonic() - began,
        }
    )
