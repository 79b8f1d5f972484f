"""`equipoise plan`: from a profile or a trace to a plan."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from equipoise.cli import console
from equipoise.cli.dataclass_options import options_of, take
from equipoise.cli.part_options import part_options
from equipoise.errors import InputError
from equipoise.options import PlanOptions


@click.command(name="plan")
@click.argument("profile", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Plan to write (.json).")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--front", is_flag=True, help="Print the Pareto front and plot it beside --out (OUT.front.png).")
@click.option(
    "--from",
    "previous",
    type=click.Path(path_type=Path),
    help="Plan in place: keep slots on its ranks, say what moves.",
)
@part_options
@options_of(PlanOptions)
def command(
    profile: Path,
    out: Path | None,
    force: bool,
    front: bool,
    previous: Path | None,
    steps: str | None,
    tokens: str | None,
    window: int | None,
    **values: Any,
) -> None:
    """Plan replicas and precision from PROFILE, a profile or a routing trace (.npz), under a byte budget.

    Traces carry no expert sizes: give --expert-bytes, the bytes of one expert; the lower precision then counts as
    half of it. Without, bytes are shown in units of half an expert, and budgets stay relative.

    \b
    Examples:
      equipoise profile demo --out demo.npz
      equipoise plan demo.npz --out plan.json
      equipoise plan demo.npz --preset paper --out paper.json
      equipoise plan demo.npz --replicas 2 --ranks 2 --out ranks.json
      equipoise plan demo.npz --front --out front.json
    """
    options = take(PlanOptions, values)
    if out is None:
        raise InputError("nowhere to write the plan: give --out FILE.json")
    from equipoise.files import load_plan, load_profile, require_destination, save_plan
    from equipoise.metrics import lis, slot_lis, slot_load
    from equipoise.planning import pareto_front, plan, take_part
    from equipoise.planning.importance import importance_name

    require_destination(out, force, [profile])
    picture = out.with_suffix(".front.png")
    if front:
        if options.preset != "joint":
            raise InputError(
                "the paper's preset is a single plan and has no front: leave --front out, or --preset joint"
            )
        require_destination(picture, force)
    measured = take_part(load_profile(profile), steps, tokens, window)
    old = None if previous is None else load_plan(previous)
    began = time.perf_counter()
    made = plan(measured, options, previous=old)
    seconds = time.perf_counter() - began
    if options.preset == "joint" and options.importance is None and "error" not in measured.importance:
        console.note(f"{profile} carries no measured importance: importance is {importance_name(measured, options)}")
    save_plan(made, out)
    before = lis(measured.counts)
    after = [
        slot_lis(slot_load(n, layer), layer.num_experts) for n, layer in zip(measured.counts, made.layers, strict=True)
    ]
    console.table(
        f"Plan {made.preset}: {made.budget.plan_bytes:,} of {made.budget.limit_bytes:,} bytes allowed "
        f"(original {made.budget.original_bytes:,}); LIS in sample, 1 is perfect balance",
        ("layer", "LIS before", "LIS planned", "slots", "replicas", "quantized"),
        [
            (
                layer.layer,
                f"{before[i]:.3f}",
                f"{after[i]:.3f}",
                len(layer.slots),
                len(layer.slots) - layer.num_experts,
                int(layer.quantized().sum()),
            )
            for i, layer in enumerate(made.layers)
        ],
        (
            "all",
            f"{before.mean():.3f}",
            f"{sum(map(float, after)) / len(after):.3f}",
            sum(len(layer.slots) for layer in made.layers),
            made.num_replicas,
            made.num_quantized,
        ),
    )
    result: dict[str, Any] = {
        "out": str(out),
        "replicas": made.num_replicas,
        "quantized": made.num_quantized,
        "bytes_plan": made.budget.plan_bytes,
        "bytes_limit": made.budget.limit_bytes,
        "bytes_original": made.budget.original_bytes,
        "predicted_lis": made.predicted["lis"],
        "predicted": dict(made.predicted),
        "seconds": seconds,
    }
    if options.ranks > 1:
        result["rank_imbalance"] = made.predicted["rank_imbalance"]
        standby = sum(slot.share == 0 for layer in made.layers for slot in layer.slots)
        result["standby_slots"] = standby
        if standby:
            console.note(
                f"{standby} slots stand by (share 0), where EPLB would put an expert on a rank twice; engines that "
                "split evenly need --shares even"
            )
    if old is not None:
        result["moved_bytes"] = int(made.predicted["moved_bytes"])
    if front:
        points = pareto_front(measured, options)
        console.table(
            "Pareto front at this budget (LIS in sample; quality loss: weighted share of tokens on low slots)",
            ("", "LIS", "quality loss", "replicas", "quantized", "quality weight"),
            [
                (
                    "chosen" if p.chosen else "",
                    f"{p.lis:.4f}",
                    f"{p.quality_loss:.4f}",
                    p.replicas,
                    p.quantized,
                    f"{p.quality_weight:.4g}",
                )
                for p in points
            ],
        )
        from equipoise.planning.picture import draw_front

        draw_front(points, picture)
        result["front"] = [{"lis": p.lis, "quality_loss": p.quality_loss, "chosen": p.chosen} for p in points]
        result["picture"] = str(picture)
    console.last_line(result)
