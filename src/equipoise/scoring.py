"""Held-out scoring: the imbalance of a plan on another profile or trace, window by window.

Beside the plan's figure stand the raw one (the model as it is: one slot an expert, experts on ranks in order, in
blocks of equal size) and the oracle (as many slots a layer as the plan has, replicated for each window with that
window's own loads: what no plan made beforehand can beat at one device).

The measures are those of `equipoise.metrics`, each averaged over windows and layers with equal weight; a layer
without load in a window counts as balanced (1). Nothing says whether the windows were part of the planning: that
is for the caller to keep apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from equipoise.errors import InputError
from equipoise.metrics import lis, max_over_mean, rank_load, slot_lis, slot_load
from equipoise.planning.replicas import replica_counts
from equipoise.types import FloatArray, IntArray, Plan, Profile


@dataclass(frozen=True)
class Score:
    """Imbalance of a plan on a profile; every array is float64 [windows, L].

    Attributes:
        layers: number of each layer.
        lis_raw, lis, lis_oracle: Load Imbalance Score.
        slot_imbalance_raw, slot_imbalance: max over mean of the slots.
        rank_imbalance_raw, rank_imbalance: max over mean of the plan's ranks (1 on one rank).
    """

    layers: tuple[int, ...]
    lis_raw: FloatArray
    lis: FloatArray
    lis_oracle: FloatArray
    slot_imbalance_raw: FloatArray
    slot_imbalance: FloatArray
    rank_imbalance_raw: FloatArray
    rank_imbalance: FloatArray

    MEASURES = (
        "lis_raw",
        "lis",
        "lis_oracle",
        "slot_imbalance_raw",
        "slot_imbalance",
        "rank_imbalance_raw",
        "rank_imbalance",
    )

    @property
    def windows(self) -> int:
        """How many windows were scored."""
        return int(self.lis.shape[0])

    def means(self) -> dict[str, float | int]:
        """Mean of each measure over windows and layers, and `windows`."""
        return {**{name: float(getattr(self, name).mean()) for name in self.MEASURES}, "windows": self.windows}

    def layer_means(self) -> dict[str, FloatArray]:
        """Mean of each measure over windows, [L]."""
        return {name: getattr(self, name).mean(0) for name in self.MEASURES}


def score(plan: Plan, profile: Profile) -> Score:
    """Score a plan on the windows of a profile (its `series`), or on its total when it has no windows.

    Raises:
        InputError: the profile is of a model with other layers or experts.
    """
    require_same_layers(plan, profile)
    windows = profile.series if profile.series is not None else profile.counts[None]
    return score_counts(plan, windows)


def score_counts(plan: Plan, windows: IntArray) -> Score:
    """Score a plan on loads.

    Args:
        plan: L layers of E experts.
        windows: [windows, L, E] selections.
    """
    raw_ranks = np.arange(plan.model.num_experts) * plan.ranks // plan.model.num_experts
    columns: dict[str, list[FloatArray]] = {name: [] for name in Score.MEASURES}
    for i, layer in enumerate(plan.layers):
        n = windows[:, i].astype(np.float64)
        slots = slot_load(n, layer)
        oracle = n / replica_counts(n, len(layer.slots) - layer.num_experts)
        raw_rank = np.zeros((len(n), plan.ranks))
        np.add.at(raw_rank.T, raw_ranks, n.T)
        figures = (
            lis(n),
            slot_lis(slots, layer.num_experts),
            _level_lis(oracle, n),
            max_over_mean(n),
            max_over_mean(slots),
            max_over_mean(raw_rank),
            max_over_mean(rank_load(slots, layer, plan.ranks)),
        )
        for name, values in zip(Score.MEASURES, figures, strict=True):
            columns[name].append(values)
    arrays = {name: np.stack(values, axis=1) for name, values in columns.items()}
    return Score(layers=tuple(layer.layer for layer in plan.layers), **arrays)


def require_same_layers(plan: Plan, profile: Profile) -> None:
    """Refuse a profile whose layers or experts are not those of the plan.

    Raises:
        InputError: naming both.
    """
    if profile.num_experts != plan.model.num_experts:
        raise InputError(
            f"the plan is for {plan.model.num_experts} experts a layer, the profile has {profile.num_experts}: "
            "score a plan on a profile of the same model"
        )
    planned = [layer.layer for layer in plan.layers]
    measured = [int(number) for number in profile.layer_ids]
    if planned != measured:
        raise InputError(
            f"the plan is for layers {_short(planned)}, the profile has {_short(measured)}: "
            "score a plan on a profile of the same model"
        )


def _level_lis(shares: FloatArray, n: FloatArray) -> FloatArray:
    """LIS [windows] from the load a slot of each expert, [windows, E], and the experts' loads."""
    total = n.sum(-1)
    top = shares.max(-1) * n.shape[-1]
    return np.divide(top, total, out=np.ones_like(total), where=total > 0)


def _short(numbers: list[int]) -> str:
    """A list of layer numbers, shortened."""
    if len(numbers) <= 6:
        return ", ".join(map(str, numbers))
    return f"{numbers[0]}, {numbers[1]}, ... {numbers[-1]} ({len(numbers)} layers)"
