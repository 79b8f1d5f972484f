"""The run directory of `equipoise balance`: reads its three files and makes sure they belong together.

    profile.npz   what was measured on calibration text
    plan.json     what was decided
    metrics.json  what came of it on held-out text

A report made of a profile of one run and the metrics of another would look right and be wrong, so shapes, layers
and the profile's hash are compared, and a difference is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from equipoise.errors import InputError
from equipoise.files import load_plan, load_profile, profile_hash
from equipoise.metrics import lis
from equipoise.reporting.metrics_file import TOLERANCE, Metrics, load_metrics
from equipoise.types import Plan, Profile

FILES = ("profile.npz", "plan.json", "metrics.json")


@dataclass(frozen=True)
class Run:
    """What one run measured, planned and proved.

    Attributes:
        path: the run directory.
        profile: L layers, E experts.
        plan: made from that profile.
        metrics: of the model before and after that plan.
    """

    path: Path
    profile: Profile
    plan: Plan
    metrics: Metrics

    @property
    def labels(self) -> list[str]:
        """L short names of the layers that tell them apart."""
        return layer_labels([layer.layer for layer in self.plan.layers], [layer.name for layer in self.plan.layers])


def load_run(path: Path) -> Run:
    """Read the three files of a run directory.

    Raises:
        InputError: the directory or a file is missing or wrong, or the files are of different runs.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"no such run directory: {path}; make one with `equipoise balance --out {path}`")
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing:
        raise InputError(f"{path} is no run of `equipoise balance`: {', '.join(missing)} is missing")
    run = Run(
        path, load_profile(path / "profile.npz"), load_plan(path / "plan.json"), load_metrics(path / "metrics.json")
    )
    try:
        _check(run)
    except InputError as error:
        raise InputError(f"{path}: {error}; its files are not of one run, make it again") from None
    return run


def _check(run: Run) -> None:
    profile, plan, metrics = run.profile, run.plan, run.metrics
    for where, layers, experts in (
        ("plan.json", len(plan.layers), plan.model.num_experts),
        ("metrics.json", len(metrics.layers), len(metrics.heldout_counts[0])),
    ):
        if (layers, experts) != profile.counts.shape:
            raise InputError(
                f"{where} has {layers} layers of {experts} experts, profile.npz has "
                f"{profile.num_layers} of {profile.num_experts}"
            )
    if plan.profile_sha256 != profile_hash(profile):
        raise InputError("plan.json was made from another profile (its profile_sha256 differs)")
    in_sample = float(lis(profile.counts).mean())
    if not math.isclose(metrics.summary.lis_before_in_sample, in_sample, rel_tol=TOLERANCE):
        raise InputError(
            f"metrics.json has lis_before_in_sample {metrics.summary.lis_before_in_sample:g}, "
            f"the counts of profile.npz have {in_sample:g}"
        )
    for planned, measured, slots, number in zip(
        plan.layers, metrics.layers, metrics.heldout_slots, profile.layer_ids.tolist(), strict=True
    ):
        if not planned.layer == measured.layer == number or planned.name != measured.name:
            raise InputError(
                f"layer {number} of profile.npz stands against layer {planned.layer} {planned.name!r} of plan.json "
                f"and layer {measured.layer} {measured.name!r} of metrics.json"
            )
        if len(slots) != len(planned.slots):
            raise InputError(f"layer {number} has {len(planned.slots)} slots planned, but {len(slots)} measured")
        found = (len(planned.slots) - planned.num_experts, int(planned.quantized().sum()))
        if found != (measured.replicas, measured.quantized):
            raise InputError(
                f"layer {number} has {found[0]} replicas and {found[1]} quantized experts planned, "
                f"but {measured.replicas} and {measured.quantized} measured"
            )


def layer_labels(numbers: Sequence[int], names: Sequence[str]) -> list[str]:
    """The layers' own numbers; where a number stands twice, with the part of the name that differs.

    An encoder-decoder model counts twice: `encoder.block.1.mlp`, `decoder.block.1.mlp` become `encoder 1` and
    `decoder 1`.

    Args:
        numbers: [L] the model's own number of each layer.
        names: [L] module path of each layer's experts.
    """
    if len(set(numbers)) == len(numbers):
        return [str(number) for number in numbers]
    parts = [name.split(".") for name in names]
    for place in range(min(len(p) for p in parts)):
        words = [p[place] for p in parts]
        if len(set(words)) > 1 and not any(word.isdigit() for word in words):
            labels = [f"{word} {number}" for word, number in zip(words, numbers, strict=True)]
            if len(set(labels)) == len(labels):
                return labels
    return [f"{number} ({row})" for row, number in enumerate(numbers)]
