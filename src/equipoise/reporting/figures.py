"""The figures of a run that the report draws and tabulates, as arrays: every picture has exactly one source here.

    relative load   n[l, e] / mean_e n[l, e]; after: the expert's busiest slot over the mean *expert* load, so
                    that the row maximum is the layer's LIS, before as after (R&Q Definition 1, arXiv 2602.19938)
    activation gap  experts of a layer sorted by load, (n_(i) - n_(i+1)) / sum_e n[e]     (the paper's Figure 7)
    rank correlation of load and importance over the experts of a layer, Spearman's rho    (the paper's Figure 2)

LIS, slot imbalance and rank imbalance are `equipoise.metrics`' own and keep their names.
L layers, E experts, S_l slots of layer l.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from equipoise import metrics as measures
from equipoise.reporting.run_directory import Run
from equipoise.types import FloatArray, IntArray, LayerPlan

MIB = 2**20

UNTOUCHED, REPLICATED, QUANTIZED, BOTH = range(4)
STATUS = ("as it was", "replicated", "quantized", "replicated and quantized")


@dataclass(frozen=True, eq=False)
class Figures:
    """Arrays behind the pictures.

    Attributes:
        labels: [L] names of the layers.
        counts: int64 [L, E] held-out selections of each expert by the original model.
        busiest: int64 [L, E] held-out tokens of the busiest slot of each expert in the balanced model.
        before: [L, E] `counts` relative to the mean expert load of the layer.
        after: [L, E] `busiest` relative to the mean expert load of the layer.
        lis_before: [L] held out.
        lis_after: [L] held out, over slots.
        lis_before_in_sample: [L] of the profile's counts, which the plan was made from.
        lis_after_in_sample: [L] of the plan on those counts, as stated in the metrics.
        slot_imbalance: [L] busiest slot over mean slot, held out.
        rank_imbalance: [L] busiest rank over mean rank, held out; None when there is one rank.
        gap_before: [L, E - 1] activation gap after rank i, share of the layer's selections.
        gap_after: [L, E - 1] the same of the experts' busiest slots.
        calibration: int64 [L, E] selections on the calibration text.
        importance: name -> float32 [L, E], measured on the calibration text.
        rho: name -> [L] rank correlation of calibration load and importance; NaN where one of them is constant.
        replicas: int64 [L, E] slots of each expert.
        status: int64 [L, E] index into `STATUS`.
    """

    labels: list[str]
    counts: IntArray
    busiest: IntArray
    before: FloatArray
    after: FloatArray
    lis_before: FloatArray
    lis_after: FloatArray
    lis_before_in_sample: FloatArray
    lis_after_in_sample: FloatArray
    slot_imbalance: FloatArray
    rank_imbalance: FloatArray | None
    gap_before: FloatArray
    gap_after: FloatArray
    calibration: IntArray
    importance: dict[str, npt.NDArray[np.float32]]
    rho: dict[str, FloatArray]
    replicas: IntArray
    status: IntArray

    @property
    def shape(self) -> tuple[int, int]:
        """(L, E)."""
        layers, experts = self.counts.shape
        return layers, experts


def figures_of(run: Run) -> Figures:
    """Work out everything the report shows."""
    metrics, plan, profile = run.metrics, run.plan, run.profile
    counts = np.array(metrics.heldout_counts, dtype=np.int64)
    slots = [np.array(row, dtype=np.int64) for row in metrics.heldout_slots]
    pairs = list(zip(slots, plan.layers, strict=True))
    busiest = np.stack([busiest_slot(row, layer) for row, layer in pairs])
    totals_after = np.array([row.sum() for row in slots], dtype=np.float64)
    experts = counts.shape[1]
    replicas = np.stack([layer.replicas() for layer in plan.layers])
    quantized = np.stack([layer.quantized() for layer in plan.layers])
    many_ranks = plan.ranks > 1
    return Figures(
        labels=run.labels,
        counts=counts,
        busiest=busiest,
        before=_over(counts, counts.sum(1) / experts),
        after=_over(busiest, totals_after / experts),
        lis_before=measures.lis(counts),
        lis_after=np.array([float(measures.slot_lis(row, experts)) for row in slots]),
        lis_before_in_sample=measures.lis(profile.counts),
        lis_after_in_sample=np.array([layer.lis_after_in_sample for layer in metrics.layers]),
        slot_imbalance=np.array([float(measures.max_over_mean(row)) for row in slots]),
        rank_imbalance=np.array(
            [float(measures.max_over_mean(measures.rank_load(row, layer, plan.ranks))) for row, layer in pairs]
        )
        if many_ranks
        else None,
        gap_before=activation_gap(counts, counts.sum(1)),
        gap_after=activation_gap(busiest, totals_after),
        calibration=profile.counts,
        importance=dict(profile.importance),
        rho={name: rank_correlation(profile.counts, values) for name, values in profile.importance.items()},
        replicas=replicas,
        status=np.where(replicas > 1, REPLICATED, UNTOUCHED) + np.where(quantized, QUANTIZED, 0),
    )


def _over(load: npt.ArrayLike, mean: npt.ArrayLike) -> FloatArray:
    """[L, E] over [L]; a layer without load counts as balanced, all ones, as in `equipoise.metrics`."""
    top, bottom = np.asarray(load, dtype=np.float64), np.asarray(mean, dtype=np.float64)[:, None]
    return np.divide(top, bottom, out=np.ones_like(top), where=bottom > 0)


def busiest_slot(slots: IntArray, layer: LayerPlan) -> IntArray:
    """Tokens of the busiest slot of each expert.

    Args:
        slots: [S] tokens of each slot, in the plan's order.
        layer: the plan of the layer.

    Returns:
        int64 [E].
    """
    out = np.zeros(layer.num_experts, dtype=np.int64)
    np.maximum.at(out, [slot.expert for slot in layer.slots], slots)
    return out


def activation_gap(load: npt.ArrayLike, total: npt.ArrayLike) -> FloatArray:
    """How much busier the expert of rank i is than the one of rank i + 1, as a share of all selections.

    Args:
        load: [L, E] tokens of each expert.
        total: [L] selections of each layer.

    Returns:
        float64 [L, E - 1], never negative; 0 in a layer without load.
    """
    ordered = np.sort(np.asarray(load, dtype=np.float64), axis=1)[:, ::-1]
    gaps = ordered[:, :-1] - ordered[:, 1:]
    bottom = np.asarray(total, dtype=np.float64)[:, None]
    return np.divide(gaps, bottom, out=np.zeros_like(gaps), where=bottom > 0)


def rank_correlation(load: npt.ArrayLike, importance: npt.ArrayLike) -> FloatArray:
    """Spearman's rho of each layer, NaN where load or importance is the same for all experts.

    Args:
        load: [L, E].
        importance: [L, E].

    Returns:
        float64 [L], -1 to 1.
    """
    out = []
    for n, value in zip(np.asarray(load), np.asarray(importance), strict=True):
        constant = np.ptp(n) == 0 or np.ptp(value) == 0
        out.append(np.nan if constant else float(stats.spearmanr(n, value).statistic))
    return np.array(out)
