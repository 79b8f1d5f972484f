"""`equipoise score`: imbalance of a plan on another profile or trace."""

from __future__ import annotations

from pathlib import Path

import click

from equipoise.cli import console
from equipoise.cli.part_options import part_options


@click.command(name="score")
@click.argument("plan", type=click.Path(path_type=Path))
@click.argument("profile", type=click.Path(path_type=Path))
@part_options
def command(plan: Path, profile: Path, steps: str | None, tokens: str | None, window: int | None) -> None:
    """Score PLAN on PROFILE, a profile or routing trace (.npz) that it was not made from.

    Every window of the profile is scored by itself; figures are means over windows. `raw` is the model as it is,
    `oracle` replicates for each window with that window's own loads and as many slots as the plan has. A plan made
    from the same tokens is scored in sample: use --steps or --tokens to keep planning and scoring apart.

    \b
    Examples:
      equipoise profile demo --out demo.npz
      equipoise plan demo.npz --steps 0:50% --out plan.json
      equipoise score plan.json demo.npz --steps 50%:
    """
    from equipoise.files import load_plan, load_profile
    from equipoise.files.profile_npz import profile_hash
    from equipoise.planning import take_part
    from equipoise.scoring import score, score_counts

    planned = load_plan(plan)
    part = take_part(load_profile(profile), steps, tokens, window)
    found = score(planned, part)
    if profile_hash(part) == planned.profile_sha256:
        console.note("in sample: this plan was made from exactly this part of this profile")
    means, layers = found.means(), found.layer_means()
    names = found.MEASURES
    console.table(
        f"{plan} on {profile}: mean of {found.windows} window{'s' * (found.windows != 1)}, 1 is perfect balance "
        "(slots, ranks: max / mean)",
        ("layer", "LIS raw", "LIS", "LIS oracle", "slots raw", "slots", "ranks raw", "ranks"),
        [
            (number, *(f"{layers[name][i]:.3f}" for name in names))
            for i, number in enumerate(found.layers)
        ],
        ("all", *(f"{means[name]:.3f}" for name in names)),
    )  # fmt: skip
    pooled = score_counts(planned, part.counts[None]).means()
    console.last_line({**means, "pooled": {name: pooled[name] for name in names}})
