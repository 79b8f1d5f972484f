"""Some of the calibration text, for what is dear to measure: sequences spread evenly over all of it.

Text comes in order, domain after domain; whole batches would be of one domain or two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

Batch = Mapping[str, torch.Tensor]
"""`input_ids`, `attention_mask` [B, Q], and what else the model is called with."""


def spread_out(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """About so many tokens.

    Args:
        batches: all there are.
        tokens: that are not padding; 0: none.

    Returns:
        Sequences in their order, those of one length side by side in batches no larger than the largest that was given.
    """
    if not tokens:
        return []
    rows = [(i, row) for i, batch in enumerate(batches) for row in range(len(batch["input_ids"]))]
    mean = sum(int(batch["attention_mask"].sum()) for batch in batches) / len(rows)
    wanted = min(len(rows), max(1, math.ceil(tokens / max(mean, 1))))
    kept = [rows[int(i)] for i in (np.arange(wanted) + 0.5) * len(rows) / wanted]
    alike: dict[tuple[tuple[str, torch.Size], ...], list[dict[str, torch.Tensor]]] = {}
    for i, row in kept:
        one = {key: value[row : row + 1] for key, value in batches[i].items()}
        alike.setdefault(tuple((key, value.shape) for key, value in one.items()), []).append(one)
    size = max(len(batch["input_ids"]) for batch in batches)
    found: list[Batch] = []
    for group in alike.values():
        for first in range(0, len(group), size):
            part = group[first : first + size]
            found.append({key: torch.cat([one[key] for one in part]) for key in part[0]})
    return found
