"""What the planner is measured on: the traces cut into a part to plan on and a part to score on, and the measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from equipoise.errors import InputError
from equipoise.files import load_profile
from equipoise.metrics import max_over_mean, rank_load, slot_load
from equipoise.planning import take_part
from equipoise.planning.placement import rank_bound
from equipoise.types import LayerPlan, Profile


@dataclass(frozen=True)
class Case:
    """A trace: what is planned on, and what is held out (None when it has only its total)."""

    name: str
    plan: Profile
    held: Profile | None
    how: str


def traces(folder: Path) -> Iterator[Case]:
    """Every measured trace: per-token ids 10 % to plan, the rest in windows of 1,024 tokens; series half and half."""
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise InputError(f"no traces in {folder}: this benchmark needs the published routing traces; give --traces DIR")
    for path in files:
        if path.name.startswith("EXAMPLE"):
            continue
        profile = load_profile(path)
        name = path.name.removesuffix(".npz")
        if profile.topk_ids is not None:
            head, tail = take_part(profile, tokens="0:10%"), take_part(profile, tokens="10%:", window=1024)
            yield Case(name, head, tail, "tokens 0:10% / 10%: in windows of 1,024")
        elif profile.series is not None:
            yield Case(name, take_part(profile, steps="0:50%"), take_part(profile, steps="50%:"), "steps 0:50% / 50%:")
        else:
            yield Case(name, profile, None, "total only, in sample")


def imbalance(table: np.ndarray, windows: np.ndarray, shares: np.ndarray | None = None) -> float:
    """Mean over windows of max over mean of the ranks.

    Args:
        table: [G, C] expert in each place; E stands for an empty one.
        windows: [W, E] tokens.
        shares: [G, C] part of its expert's tokens that each place takes; None: even.
    """
    n = np.atleast_2d(np.asarray(windows, dtype=np.float64))
    n = n[n.sum(1) > 0]
    if not len(n):
        return 1.0
    if shares is None:
        shares = 1.0 / np.bincount(table.ravel(), minlength=n.shape[1] + 1)[table]
    ranks = (np.append(n, np.zeros((len(n), 1)), 1)[:, table] * shares).sum(2)
    return float((ranks.max(1) / ranks.mean(1)).mean())


def planned_imbalance(layer: LayerPlan, ranks: int, windows: np.ndarray) -> float:
    """The same of a layer of a plan, by the product's own measures."""
    n = np.atleast_2d(np.asarray(windows, dtype=np.float64))
    n = n[n.sum(1) > 0]
    return float(max_over_mean(rank_load(slot_load(n, layer), layer, ranks)).mean()) if len(n) else 1.0


def bound(counts: np.ndarray, slots: int, ranks: int) -> float:
    """Mean over layers of the lower bound on even-share rank imbalance; see `rank_bound`."""
    return float(np.mean([rank_bound(n.astype(np.float64), slots, ranks) for n in counts]))


def greedy(load: np.ndarray, slots: int, ranks: int) -> np.ndarray:
    """Plain greedy: replicas to the heaviest, then slots dealt to the ranks like cards, heaviest first, to and fro."""
    r = np.ones(len(load), dtype=np.int64)
    for _ in range(slots - len(load)):
        r[(load / r).argmax()] += 1
    owner = np.repeat(np.arange(len(load)), r)
    owner = owner[np.argsort(-(load / r)[owner], kind="stable")]
    places = slots // ranks
    deal = owner.reshape(places, ranks)
    deal[1::2] = deal[1::2, ::-1].copy()
    return deal.T
