"""`equipoise export`: hand a plan's placement to a serving engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from equipoise.cli import console
from equipoise.cli.dataclass_options import options_of, take
from equipoise.exchange import EXPORTERS, ExportOptions, check_suffix, export_plan
from equipoise.files import load_plan, load_profile, require_destination


@click.command("export")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--to", "engine", required=True, type=click.Choice(list(EXPORTERS)), help="The engine.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The file: .json, .pt (sglang), .yaml (trtllm)."
)
@options_of(ExportOptions)
@click.option(
    "--pad",
    type=click.Path(path_type=Path),
    help="Profile by whose loads ranks of unequal size are filled with further replicas (takes memory).",
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
def command(plan: Path, engine: str, out: Path, pad: Path | None, force: bool, **values: Any) -> None:
    """Write a PLAN's placement in the format of a serving engine.

    Engines run one replica count in all layers, equal ranks, one precision a layer and an even split between
    replicas. A plan that asks for more is refused with the reason: make it with --shares even.

    \b
    A plan they can run, and its file, from the profile of the demo model:
      equipoise balance --out run
      equipoise plan run/profile.npz --replicas 4 --ranks 4 --shares even --out plan.json
      equipoise export plan.json --to sglang --placement-only --out map.json
    """
    options = take(ExportOptions, values)
    check_suffix(engine, out)
    require_destination(out, force)
    done = export_plan(load_plan(plan), engine, out, options, load_profile(pad) if pad else None)
    placement = done.placement
    console.table(
        f"{plan.name} for {engine}",
        ("placement", "value"),
        [
            ("MoE layers", len(placement.layer_ids)),
            ("rows in the file", done.rows),
            ("experts a layer", placement.num_experts),
            ("slots a layer", placement.slots),
            ("redundant slots a layer", placement.redundant),
            ("ranks", placement.ranks),
            ("slots a rank", placement.slots // placement.ranks),
            ("slots added by --pad", placement.added),
            ("precisions dropped", placement.lost_precisions),
            ("unequal shares dropped", placement.lost_shares),
        ],
    )
    for line in done.notes:
        console.note(f"note: {line}")
    console.note(f"start: {done.start}")
    console.last_line(
        {
            "engine": engine,
            "file": str(done.path),
            "layers": len(placement.layer_ids),
            "rows": done.rows,
            "experts": placement.num_experts,
            "slots": placement.slots,
            "redundant": placement.redundant,
            "ranks": placement.ranks,
            "slots_a_rank": placement.slots // placement.ranks,
            "added": placement.added,
            "lost_precisions": placement.lost_precisions,
            "lost_shares": placement.lost_shares,
        }
    )
