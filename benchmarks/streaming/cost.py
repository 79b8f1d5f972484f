"""What telemetry and the balancer cost a forward.

    python benchmarks/streaming/cost.py [--model demo] [--tokens 1,8,64,512] [--forwards 8] [--rounds 15]

The model gets a plan of E/4 spare slots a layer at budget 1.0, from a profile of random tokens, and runs batches of
one sequence: bare, inside `Telemetry`, inside an open `StreamingBalancer` that decides but must not move
(move_bytes=0), and inside one that may move. The four take turns of so many forwards within each round; reported is
the median over rounds of the ratio to the bare turn of the same round. Windows have 512 tokens: forwards of 512 pay
for one decision each, shorter ones for the counting only. Run it alone on the machine. The last stdout line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

import equipoise as eq
from equipoise.models.loading import load_model
from equipoise.pipeline.versions import made_with
from equipoise.streaming import AdaptiveOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", default="1,8,64,512")
    parser.add_argument("--forwards", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(arguments.model, tokenizer=False).model
    words = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)

    def batch(tokens: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, words, (1, tokens), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    profile = eq.profile(model, [batch(256) for _ in range(4)])
    replicas = max(1, profile.num_experts // 4)
    eq.apply(model, eq.plan(profile, replicas=replicas, budget=1.0))
    still = AdaptiveOptions(move_bytes=0)
    ways: dict[str, AbstractContextManager[object]] = {
        "bare": nullcontext(),
        "telemetry": eq.Telemetry(model),
        "balancer, no moves": eq.StreamingBalancer(model, options=still),
        "balancer": eq.StreamingBalancer(model),
    }

    @torch.no_grad()
    def seconds(inputs: dict[str, torch.Tensor], repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            model(**inputs, use_cache=False)
        return (time.perf_counter() - begin) / repeats

    print(f"{'tokens':>7}{'ms bare':>9}" + "".join(f"{name:>20}" for name in list(ways)[1:]))
    rows = {}
    for tokens in map(int, arguments.tokens.split(",")):
        inputs = batch(tokens)
        seconds(inputs, 2)
        took: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                with way:
                    took[name].append(seconds(inputs, arguments.forwards))
        bare = np.array(took["bare"])
        rows[tokens] = {name: float(np.median(np.array(took[name]) / bare)) for name in ways if name != "bare"}
        rows[tokens]["ms_bare"] = float(np.median(bare)) * 1000
        print(f"{tokens:>7}{rows[tokens]['ms_bare']:>9.2f}"
              + "".join(f"{rows[tokens][name]:>20.3f}" for name in list(ways)[1:]), flush=True)  # fmt: skip
    print(json.dumps({"model": arguments.model, "replicas": replicas, "ratio": rows, **made_with()}))


if __name__ == "__main__":
    main()
