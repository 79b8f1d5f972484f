"""Bytes of a slot: what an expert weighs at its original and at the lower precision.

A live profile carries the true bytes (`expert_bytes`, scales and biases included). Published traces carry none:
there `expert_bytes` of the options gives the original size, and the lower precision is taken as half of it
(8 of 16 bits, or 16 of 32; a quarter for 8 of 32). With neither, an expert weighs 2 units: the plan is the same,
because budgets are relative, and only its byte figures are units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np

from equipoise.errors import InputError
from equipoise.options import LowPrecision, PlanOptions
from equipoise.types import IntArray, Precision, Profile

_BYTES_OF = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "int8_weight_only": 1}


@dataclass(frozen=True)
class Sizes:
    """Bytes of one slot of each expert.

    Attributes:
        low_name: the lower precision.
        original: int64 [L, E].
        low: int64 [L, E].
    """

    low_name: Precision
    original: IntArray
    low: IntArray

    @property
    def total(self) -> int:
        """Bytes of the routed experts of the original model (exact: Python integers do not overflow)."""
        return sum(self.original.ravel().tolist())

    def of(self, replicas: IntArray, low_slots: IntArray) -> int:
        """Bytes of `replicas` [L, E] slots an expert, `low_slots` [L, E] of them at the lower precision."""
        kept = ((replicas - low_slots) * self.original).ravel().tolist()
        return sum(kept) + sum((low_slots * self.low).ravel().tolist())


def slot_sizes(profile: Profile, options: PlanOptions) -> Sizes:
    """Bytes of every slot at both precisions.

    Raises:
        InputError: the profile does not know the lower precision, or both it and the options give sizes.
    """
    dtype = str(profile.meta.get("dtype") or "").removeprefix("torch.")
    low: Precision = "float16" if dtype == "float32" else "int8"
    # What the importance was measured for, unless the options say otherwise.
    for name in get_args(LowPrecision):
        if name == (options.low_precision or profile.meta.get("low_precision")):
            low = name
    if profile.expert_bytes:
        if options.expert_bytes is not None:
            raise InputError("expert-bytes is for traces that carry no sizes; this profile has them: leave it out")
        # The two int8 formats store the same tensors.
        stored = "int8" if low == "int8_weight_only" and low not in profile.expert_bytes else low
        for name in ("original", stored):
            if name not in profile.expert_bytes:
                known = ", ".join(sorted(profile.expert_bytes))
                raise InputError(
                    f"the profile has no expert_bytes_{name} (it has {known}): choose another low precision"
                )
        for name in ("original", stored):
            if float(profile.expert_bytes[name].max()) * profile.counts.size > 2**55:
                raise InputError(f"expert_bytes_{name} adds up to more than 32 pebibytes: not the size of a model")
        return Sizes(low, profile.expert_bytes["original"], profile.expert_bytes[stored])
    wide, narrow = _BYTES_OF.get(dtype, 2 * _BYTES_OF[low]), _BYTES_OF[low]
    if narrow >= wide:
        raise InputError(f"{low} is no smaller than the model's own {dtype}: choose another low precision")
    original = options.expert_bytes if options.expert_bytes is not None else wide // narrow
    if original > 2**40:
        raise InputError(f"expert-bytes {original} is beyond a tebibyte for one expert: give bytes, not bits")
    shape = profile.counts.shape
    return Sizes(
        low,
        np.full(shape, original, dtype=np.int64),
        np.full(shape, -(-original * narrow // wide), dtype=np.int64),
    )
