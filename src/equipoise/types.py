"""The two things that travel between stages: a `Profile` (what was measured) and a `Plan` (what to do).

Shapes: L MoE layers, E routed experts of a layer, k experts a token selects, T tokens, S slots of a layer.
Both are frozen and hold numpy arrays or plain values only; reading and writing them is in `equipoise.files`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

Precision = Literal["original", "int8", "int8_weight_only", "float16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
"""`original` is the dtype of the checkpoint; the others are formats of `equipoise.formats`."""

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Profile:
    """What was measured on calibration text.

    Attributes:
        counts: int64 [L, E]. Selections of each expert, padding never counted.
        layer_ids: int64 [L]. The model's own number of each MoE layer.
        meta: format, version, model, model_type, top_k, dtype, tokens, data, created_by (traces carry others).
        layer_names: module path of each layer's experts, or empty for traces.
        series: int64 [steps, L, E] when windows were kept; `series.sum(0) == counts`.
        topk_ids: int [T, L, k] per-token expert ids (traces only).
        importance: name -> float32 [L, E]; larger means that lowering the expert's precision costs more for
            `error`; `wanda` is the raw score of Algorithm 2 (arXiv 2602.19938), whose direction is a parameter.
        expert_bytes: precision -> int64 [L, E], true bytes of one slot of the expert at that precision.
            Empty for traces that carry no sizes.
    """

    counts: IntArray
    layer_ids: IntArray
    meta: Mapping[str, Any]
    layer_names: tuple[str, ...] = ()
    series: IntArray | None = None
    topk_ids: npt.NDArray[np.integer[Any]] | None = None
    importance: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    expert_bytes: Mapping[str, IntArray] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.counts.shape[0])

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.counts.shape[1])

    @property
    def top_k(self) -> int:
        """k, experts a token selects (0 when the file does not say)."""
        return int(self.meta.get("top_k") or 0)


@dataclass(frozen=True)
class Slot:
    """One physical expert.

    Attributes:
        expert: routed (logical) expert it holds a copy of.
        precision: `original`, `int8` (W8A8), `int8_weight_only` (W8A16) or `float16`.
        rank: device under expert parallelism; 0 when there is one device.
        share: fraction of the expert's tokens this slot takes; shares of an expert sum to 1. A slot with share 0
            stands by: it holds its expert and takes no tokens.
    """

    expert: int
    precision: Precision = "original"
    rank: int = 0
    share: float = 1.0


@dataclass(frozen=True)
class LayerPlan:
    """The slots of one MoE layer, sorted by expert, original precision first.

    Attributes:
        layer: the model's own number of the layer.
        name: module path of the layer's experts ("" when planned from a trace).
        num_experts: E.
        slots: every expert 0..E-1 has at least one.
    """

    layer: int
    name: str
    num_experts: int
    slots: tuple[Slot, ...]

    @property
    def is_identity(self) -> bool:
        """True when the layer is as in the original model: one slot an expert, original precision."""
        return len(self.slots) == self.num_experts and all(s.precision == "original" for s in self.slots)

    def replicas(self) -> IntArray:
        """int64 [E]. Slots of each expert (1 = no spare copy)."""
        return np.bincount([s.expert for s in self.slots], minlength=self.num_experts).astype(np.int64)

    def evenly(self) -> LayerPlan:
        """The layer with the same slots, each expert's tokens split evenly between them."""
        even = 1.0 / self.replicas()
        return replace(self, slots=tuple(replace(s, share=float(even[s.expert])) for s in self.slots))

    def quantized(self) -> npt.NDArray[np.bool_]:
        """Bool [E]. Experts of which no slot is left at the original precision."""
        kept = np.zeros(self.num_experts, dtype=bool)
        kept[[s.expert for s in self.slots if s.precision == "original"]] = True
        return ~kept


@dataclass(frozen=True)
class Budget:
    """Bytes of the routed experts of all MoE layers: in the original model, allowed, and as planned."""

    original_bytes: int
    limit_bytes: int
    plan_bytes: int


@dataclass(frozen=True)
class ModelIdentity:
    """What a plan was made for; a plan is refused on a model that differs.

    `name` is informative (a path may move); type, layers, experts and dtype are compared.
    """

    name: str
    model_type: str
    num_layers: int
    num_experts: int
    top_k: int
    dtype: str


@dataclass(frozen=True)
class Plan:
    """Which slots each layer gets.

    Attributes:
        model: identity of the model it was made for.
        profile_sha256: hash of the profile's contents (`equipoise.files.profile_hash`).
        preset: how it was made (`paper`, `joint` or an ablation's name).
        seed: of everything random in the making.
        budget: bytes.
        ranks: number of devices the slots are placed on.
        layers: one per MoE layer, in the profile's order.
        predicted: what the planner expects, in sample, by name (`lis`, `lis_before`, ...).
    """

    model: ModelIdentity
    profile_sha256: str
    preset: str
    seed: int
    budget: Budget
    ranks: int
    layers: tuple[LayerPlan, ...]
    predicted: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_replicas(self) -> int:
        """Spare slots over all layers: slots minus experts."""
        return sum(len(layer.slots) - layer.num_experts for layer in self.layers)

    @property
    def num_quantized(self) -> int:
        """Experts over all layers of which no slot is left at the original precision."""
        return int(sum(layer.quantized().sum() for layer in self.layers))
