"""One reading: the load of the latest window, what the balancer did, what LASER rerouted, as a plain dict.

    lis                    E * max over slots / all selections of the layer, slots as they executed
    lis_without_replicas   E * max over experts / all selections: what it would be with a slot each
    slot_imbalance         max over slots / mean over slots                       (all three: `equipoise.metrics`)

of the latest window of live load, mean over the layers that had load in it. Everything else counts up from the start.
What is not there (no window yet, no balancer, no LASER) is None, so that nothing is taken for a zero. Reading computes
from numbers that are kept anyway: it runs nothing on the model and resets nothing.

L layers, E experts, S slots of a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise.metrics import lis, max_over_mean, slot_lis

if TYPE_CHECKING:
    from equipoise.profiling.live_windows import LiveWindows
    from equipoise.rerouting.install import Laser
    from equipoise.runtime.balancer import StreamingBalancer

MEASURES = ("lis", "lis_without_replicas", "slot_imbalance")
"""Names of the measures of a window."""


def read(windows: LiveWindows, balancer: StreamingBalancer | None = None, laser: Laser | None = None) -> dict[str, Any]:
    """Read everything once.

    Args:
        windows: of the live load.
        balancer: whose moves and time are read.
        laser: whose rerouted tokens are read.

    Returns:
        window (tokens a window), windows (closed so far), tokens (seen so far, padding left out); the three measures;
        steps, moves, moved_bytes, balancer_seconds, failures, missed_windows; laser_decisions (a token counts in
        every layer that LASER decides), rerouted; and layers: the model's number of a layer, a string -> its three
        measures, moves, laser_decisions, rerouted.
    """
    layers: dict[str, dict[str, Any]] = {label: dict.fromkeys(MEASURES) for label in windows.labels.values()}
    latest = windows.latest
    if latest is not None:
        counts = latest.counts
        for row, label in enumerate(windows.labels.values()):
            if counts[row].any():
                slots = latest.slots[row]
                measured = (slot_lis(slots, windows.num_experts), lis(counts[row]), max_over_mean(slots))
                layers[label] = {name: float(value) for name, value in zip(MEASURES, measured, strict=True)}
    out: dict[str, Any] = {"window": windows.window, "windows": windows.count, "tokens": windows.tokens}
    for name in MEASURES:
        heard = [values[name] for values in layers.values() if values[name] is not None]
        out[name] = float(np.mean(heard)) if heard else None
    moved = [None] * len(layers) if balancer is None else balancer.moved.tolist()
    for values, moves in zip(layers.values(), moved, strict=True):
        values["moves"] = moves
    out |= {
        "steps": None if balancer is None else balancer.steps,
        "moves": None if balancer is None else balancer.moves,
        "moved_bytes": None if balancer is None else balancer.moved_bytes,
        "balancer_seconds": None if balancer is None else balancer.seconds,
        "failures": None if balancer is None else balancer.failed,
        "missed_windows": None if balancer is None else balancer.missed,
        "laser_decisions": None if laser is None else int(laser.tokens.sum()),
        "rerouted": None if laser is None else int(laser.rerouted.sum()),
        "layers": layers,
    }
    for values in layers.values():
        values["laser_decisions"] = values["rerouted"] = None
    if laser is not None:
        for routing, decisions, rerouted in zip(laser.layers, laser.tokens, laser.rerouted, strict=True):
            layers[windows.labels[routing.layer.name]] |= {"laser_decisions": int(decisions), "rerouted": int(rerouted)}
    return out
