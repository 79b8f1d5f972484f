"""What lowering an expert's precision costs: one non-negative number an expert, larger = dearer.

`error`      nats a token that lower precision of this expert alone costs, on calibration tokens: used as it is.
`output_error`  what it changes of the layer's routed output, without asking what becomes of that: used as it is.
`wanda`      score of Algorithm 2 (R&Q, arXiv 2602.19938). The paper reads "lower means higher importance", so
             with `wanda_low_is_important` the cost falls with the score; otherwise it rises. Within each layer
             the score is mapped linearly onto [0, 1].
`frequency`  tokens routed to the expert.
`random`     uniform, seeded.

Costs are compared within a layer by the paper's algorithms, and between layers by the joint optimisation, which
divides them by the sum over the model.
"""

from __future__ import annotations

import numpy as np

from equipoise.errors import InputError
from equipoise.options import ImportanceName, PlanOptions
from equipoise.types import FloatArray, Profile


def importance_name(profile: Profile, options: PlanOptions) -> ImportanceName:
    """The importance to use: the one asked for; else `wanda` for the paper's preset; else `error` where measured.

    The joint preset falls back to `frequency` on profiles that carry no measured importance (traces).
    """
    if options.importance is not None:
        return options.importance
    if options.preset == "paper":
        return "wanda"
    return "error" if "error" in profile.importance else "frequency"


def precision_cost(profile: Profile, options: PlanOptions) -> FloatArray:
    """Cost of lowering each expert's precision.

    Returns:
        float64 [L, E], at least 0.

    Raises:
        InputError: the importance asked for was not measured.
    """
    name = importance_name(profile, options)
    if name == "frequency":
        return profile.counts.astype(np.float64)
    if name == "random":
        return np.random.default_rng([options.seed, 0]).random(profile.counts.shape)
    if name not in profile.importance:
        known = ", ".join([*sorted(profile.importance), "frequency", "random"])
        raise InputError(
            f"the profile has no importance {name!r}: measure it with `equipoise profile`, or choose one of {known}"
        )
    value = np.asarray(profile.importance[name], dtype=np.float64)
    if name in ("error", "output_error"):
        return np.maximum(value, 0.0)
    low, high = value.min(1, keepdims=True), value.max(1, keepdims=True)
    scaled = np.divide(value - low, high - low, out=np.zeros_like(value), where=high > low)
    return 1.0 - scaled if options.wanda_low_is_important else scaled
