"""Replicas of a serving model change hands thousands of times: right outputs, flat memory, and at what cost?

    python benchmarks/streaming/live.py [--swaps 10000] [--threads 8]

The bundled demo model gets two spare slots a layer at its own precision, so every map computes the same function.
Threads run forwards without pause and compare each with the untouched model's logits, while a StreamingBalancer is
fed windows whose busy expert changes every time. Reported: wrong outputs (beyond rounding: slots of other sizes are
summed in another order), failures, seconds a move, tensor bytes of the experts, and resident memory after a tenth of
the swaps and at the end. The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path

import numpy as np
import torch

import equipoise as eq
from equipoise.models import find_layers
from equipoise.models.loading import load_model
from equipoise.pipeline.versions import made_with
from equipoise.runtime import expert_bytes, slot_bytes
from equipoise.types import Budget, LayerPlan, ModelIdentity, Plan, Slot


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def with_spares(model: torch.nn.Module, spare: int) -> Plan:
    """A plan of `spare` replicas a layer at the original precision."""
    layers = find_layers(model)
    experts = layers[0].num_experts
    slots = tuple(
        Slot(e, share=1 / copies) for e in range(experts) for copies in [2 if e < spare else 1] for _ in range(copies)
    )
    size = sum(slot_bytes(layer.layout, "original") for layer in layers)
    total = size * (experts + spare)
    identity = ModelIdentity(
        "demo", model.config.model_type, len(layers), experts, 0, str(layers[0].layout.dtype).removeprefix("torch.")
    )
    plans = tuple(LayerPlan(layer.layer_id, layer.name, experts, slots) for layer in layers)
    return Plan(identity, "", "benchmark", 0, Budget(size * experts, total, total), 1, plans)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model("demo")
    model = loaded.model
    ids = [torch.randint(3, 500, (1, 8), generator=torch.Generator().manual_seed(i)) for i in range(arguments.threads)]

    @torch.no_grad()
    def logits(i: int) -> torch.Tensor:
        return model(input_ids=ids[i], use_cache=False).logits.float()

    eq.apply(model, with_spares(model, 2))
    wanted = [logits(i) for i in range(arguments.threads)]
    bytes_before = expert_bytes(model)
    worst = [0.0] * arguments.threads
    forwards = [0] * arguments.threads
    stop = threading.Event()

    def serve(i: int) -> None:
        while not stop.is_set():
            found = logits(i)
            worst[i] = max(worst[i], float((found - wanted[i]).abs().max()))
            forwards[i] += 1

    shape = (len(find_layers(model)), find_layers(model)[0].num_experts)
    memory = {}
    begin = time.perf_counter()
    with eq.StreamingBalancer(model, history="short", window=10**12) as balancer:
        threads = [threading.Thread(target=serve, args=(i,)) for i in range(arguments.threads)]
        for thread in threads:
            thread.start()
        step = 0
        while balancer.moves < arguments.swaps and not balancer.failures:
            counts = np.full(shape, 10)
            counts[:, step % shape[1]] = 1000
            balancer.observe(counts)
            step += 1
            if "early" not in memory and balancer.moves >= arguments.swaps // 10:
                memory["early"] = resident()
        memory["end"] = resident()
        same_bytes = expert_bytes(model) == bytes_before
        stop.set()
        for thread in threads:
            thread.join()
        result = {
            "swaps": balancer.moves,
            "threads": arguments.threads,
            "forwards": sum(forwards),
            "largest_difference": max(worst),
            "largest_logit": max(float(w.abs().max()) for w in wanted),
            "failures": balancer.failures,
            "seconds": time.perf_counter() - begin,
            "ms_a_swap": balancer.seconds / max(balancer.moves, 1) * 1000,
            "resident_early": memory["early"],
            "resident_end": memory["end"],
            "expert_bytes_unchanged": same_bytes,
        }
    print(f"{'swaps':>8}{'forwards':>10}{'difference':>12}{'ms/swap':>9}{'MiB early':>11}{'MiB end':>9}  expert bytes")
    print(
        f"{result['swaps']:>8}{result['forwards']:>10}{result['largest_difference']:>12.2e}{result['ms_a_swap']:>9.2f}"
        f"{memory['early'] / 2**20:>11.1f}{memory['end'] / 2**20:>9.1f}  " + ("unchanged" if same_bytes else "CHANGED")
    )
    print(json.dumps({**result, **made_with()}))


if __name__ == "__main__":
    main()
