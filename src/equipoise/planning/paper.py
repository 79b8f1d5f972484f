"""R&Q Algorithms 1 to 3 (arXiv 2602.19938) and the ablations of its Table 3.

In every layer with load:
    h = argmax_e n[e]                                   heavy hitter (Algorithm 1)
    v = the least important expert other than h         (Algorithm 2, or another importance)
    h gets one replica at the lower precision, v is held at the lower precision only (Algorithm 3)

so the replica is paid for by v. The paper counts no scales: per-channel int8 scales put the result about 0.1 %
above the original bytes, which is why the budget of this preset is what the algorithm needs unless one is given.

Strategies: `rq` as above; `quantize-only` v is lowered, nothing is replicated; `random` h and v are drawn at
random; `quantize-heavy` h is lowered instead of v (and still replicated); `quantize-all` every expert is lowered,
nothing is replicated. A layer without load, or with a single expert, is kept as it is.
"""

from __future__ import annotations

import numpy as np

from equipoise.errors import InputError
from equipoise.options import PlanOptions
from equipoise.planning.assemble import finish
from equipoise.planning.importance import precision_cost
from equipoise.planning.sizes import slot_sizes
from equipoise.types import IntArray, Plan, Profile


def paper_slots(profile: Profile, options: PlanOptions) -> tuple[IntArray, IntArray]:
    """Slots of each expert and how many of them are low, as the strategy says.

    Returns:
        replicas, low_slots: int64 [L, E].

    Raises:
        InputError: the importance asked for was not measured.
    """
    counts = profile.counts
    replicas, low = np.ones_like(counts), np.zeros_like(counts)
    strategy = options.strategy
    needs_cost = strategy in ("rq", "quantize-only") and profile.num_experts > 1
    cost = precision_cost(profile, options) if needs_cost else np.zeros(counts.shape)
    draw = np.random.default_rng([options.seed, 1])
    for l, n in enumerate(counts):  # noqa: E741
        # Drawn for every layer, so that a layer's choice does not depend on the load of those before it.
        pair = draw.permutation(len(n))[:2]
        if n.max() == 0:
            continue
        if strategy == "quantize-all":
            low[l] = 1
            continue
        if len(n) == 1:
            continue
        heavy = int(n.argmax())
        others = cost[l].copy()
        others[heavy] = np.inf
        victim = int(others.argmin())
        if strategy == "random":
            heavy, victim = int(pair[0]), int(pair[1])
        elif strategy == "quantize-heavy":
            victim = heavy
        low[l, victim] = 1
        if strategy != "quantize-only":
            replicas[l, heavy] += 1
            low[l, heavy] += 1
    return replicas, low


def plan_paper(profile: Profile, options: PlanOptions, previous: Plan | None = None) -> Plan:
    """Plan as R&Q does; see the module.

    Raises:
        InputError: an explicit budget is below what the algorithm needs, or the options ask for what it has not.
    """
    if options.replicas not in (None, 1) or (
        options.replicas == 1 and options.strategy in ("quantize-only", "quantize-all")
    ):
        raise InputError(
            f"replicas {options.replicas} cannot be had from preset paper, strategy {options.strategy}: "
            "use preset joint"
        )
    if options.slots:
        raise InputError("slots cannot be set with preset paper, which adds one replica a layer: use preset joint")
    if options.group_limited:
        raise InputError("group-limited placement chooses its own replicas within each node: use preset joint")
    sizes = slot_sizes(profile, options)
    replicas, low = paper_slots(profile, options)
    needed = sizes.of(replicas, low)
    limit = max(sizes.total, needed)
    if options.budget is not None:
        limit = int(options.budget * sizes.total)
        if needed > limit:
            raise InputError(
                f"preset paper, strategy {options.strategy}, needs {needed:,} bytes ({needed / sizes.total:.4f} of the "
                f"original {sizes.total:,}), the budget {options.budget:g} allows {limit:,}: raise it, or use "
                "preset joint"
            )
    name = "paper" if options.strategy == "rq" else options.strategy
    load = list(profile.counts[:, None].astype(np.float64))
    return finish(profile, options, sizes, replicas, low, limit, name, {}, load=load, previous=previous)
