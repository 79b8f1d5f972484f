"""One MoE block on the CPU: transformers' three implementations against Equipoise's slots, on the same weights.

    OMP_NUM_THREADS=1 python benchmarks/runtime/blocks.py --shape e64 --rows 1,8,64,512

The experts module of a real transformers model with one layer is called with hidden states [T, H] and a routing drawn
from a skewed distribution (fixed seed; the LIS of the largest T is printed). Variants, all on the same bf16 weights:

    eager, batched_mm, grouped_mm   transformers (grouped_mm is its default)
    no_plan                         `equipoise.apply` of a plan that changes nothing
    bf16                            all experts as slots of the original precision
    int8_25                         the E/4 least loaded experts int8, and an int8 replica of each of the E/4 busiest
    int8, int8_weight_only ...      all experts in low precision, for each int8 format there is

`timing.py` says how times and ratios are taken. batched_mm copies the weights of every selection; it is left out where
that is more than 4 GiB, or where its first warm call took more than 20 times the fastest. The relative error of each
variant is |y - y32| / |y32| on 64 tokens, y32 computed in float32 from the same bf16 weights. Weights are normal and
keep the size of their input; those of trained models have other tails.
The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from plans import LOW, all_low, balanced, plan_of_slots, quarter_low, twin, unchanged
from timing import QUICK, Pace, compare, race, script, warm
from transformers import MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM

import equipoise as eq
from equipoise.cli import console
from equipoise.errors import InputError
from equipoise.models import find_layers
from equipoise.runtime.application import finish
from equipoise.runtime.install import fill_layer

TRANSFORMERS = ("eager", "batched_mm", "grouped_mm")
COPIED = 4 << 30
TOO_SLOW = 20.0


@dataclass(frozen=True)
class Shape:
    """E experts, k a token selects, H hidden, I intermediate; the family decides the dtype of the routing weights."""

    family: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int

    @property
    def expert_bytes(self) -> int:
        """Of one expert in bf16."""
        return 2 * 3 * self.hidden * self.intermediate

    @property
    def needed(self) -> int:
        """Bytes of all variants at once: three in 16 bits, each int8 format, one expert in float32."""
        return int(self.experts * self.expert_bytes * (3 + len(LOW) / 2) + 4 * self.expert_bytes)


SHAPES = {
    "e64": Shape("olmoe", 64, 6, 2048, 1408),
    "e8": Shape("mixtral", 8, 2, 4096, 14336),
    "demo": Shape("mixtral", 16, 2, 256, 112),
    "tiny": Shape("olmoe", 8, 2, 64, 32),  # for the tests
}


def one_layer(shape: Shape, device: torch.device | str = "cpu") -> Any:
    """A transformers model of one layer with random experts, bf16; the rest of it is as small as it can be."""
    kind, config = {"olmoe": (OlmoeForCausalLM, OlmoeConfig), "mixtral": (MixtralForCausalLM, MixtralConfig)}[
        shape.family
    ]
    experts = {"num_experts" if shape.family == "olmoe" else "num_local_experts": shape.experts}
    heads = {"num_attention_heads": shape.hidden // 64, "num_key_value_heads": 1}
    with torch.device("meta"):
        model = kind(
            config(
                vocab_size=8,
                pad_token_id=0,
                eos_token_id=1,
                hidden_size=shape.hidden,
                intermediate_size=shape.intermediate,
                num_hidden_layers=1,
                num_experts_per_tok=shape.top_k,
                dtype="bfloat16",
                **experts,
                **heads,
            )
        )
    model = model.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    draw = torch.Generator(device).manual_seed(0)
    module = experts_of(model)
    for weight in (module.gate_up_proj, module.down_proj):
        weight.normal_(0, weight.shape[-1] ** -0.5, generator=draw)
    return model


def experts_of(model: Any) -> Any:
    """The experts module of a one-layer model."""
    return model.model.layers[0].mlp.experts


def routing(shape: Shape, rows: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [T, H] bf16, experts int64 [T, k] (skewed, none twice in a row), weights [T, k] summing to 1."""
    draw = torch.Generator().manual_seed(1)
    taste = 0.6 * torch.randn(shape.experts, generator=draw)
    if seed != 1:  # other tokens of the same taste
        draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, shape.hidden, generator=draw).to(torch.bfloat16)
    noise = -torch.log(-torch.log(torch.rand(rows, shape.experts, generator=draw).clamp_(1e-9, 1 - 1e-7)))
    score, index = (taste + noise).topk(shape.top_k)
    # Mixtral hands its experts float32 weights, Olmoe those of its hidden states.
    weights = torch.softmax(score, -1).to(torch.float32 if shape.family == "mixtral" else torch.bfloat16)
    return hidden, index, weights


def variants(shape: Shape, model: Any) -> Iterator[tuple[str, Any]]:
    """(name, experts module) one after the other."""
    for name in TRANSFORMERS:
        other = twin(model)
        other.set_experts_implementation(name)
        yield name, experts_of(other)
    load = torch.bincount(routing(shape, 512)[1].reshape(-1), minlength=shape.experts).tolist()

    def planned(slots: list[Any]) -> Any:
        return plan_of_slots(model, lambda *_: slots)

    yield "no_plan", experts_of(balanced(model, planned(unchanged(shape.experts))))
    other = twin(model)
    plan = planned(unchanged(shape.experts))
    for layer, layer_plan in zip(find_layers(other), plan.layers, strict=True):
        fill_layer(layer, layer_plan)  # `apply` leaves such a layer alone
    finish(other, plan)
    yield "bf16", experts_of(other)
    yield "int8_25", experts_of(balanced(model, planned(quarter_low(load))))
    for name in LOW:
        yield name, experts_of(balanced(model, planned(all_low(shape.experts, name))))


def reference(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The block in float32 from the module's own weights: [T, H]."""
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for e in index.unique().tolist():
        row, place = torch.where(index == e)
        gate, up = (hidden[row].float() @ module.gate_up_proj[e].float().T).chunk(2, -1)
        y = (torch.nn.functional.silu(gate) * up) @ module.down_proj[e].float().T
        out.index_add_(0, row, y * weights[row, place, None].float())
    return out


def errors(shape: Shape, model: Any, modules: Mapping[str, Any]) -> dict[str, float]:
    """Relative error of each variant on 64 tokens."""
    device = experts_of(model).down_proj.device
    hidden, index, weights = (x.to(device) for x in routing(shape, 64))
    wanted = reference(experts_of(model), hidden, index, weights)
    found = {}
    for name, module in modules.items():
        if name == "batched_mm" and 64 * shape.top_k * shape.expert_bytes > COPIED:
            continue
        found[name] = float((module(hidden, index, weights).float() - wanted).norm() / wanted.norm())
    return found


def measure(shape: Shape, modules: Mapping[str, Any], rows: int, pace: Pace) -> dict[str, Any]:
    """Times of all variants at one T: see `timing.compare`; a variant left out has a `skipped` that says why."""
    arguments = routing(shape, rows)
    works: dict[str, Callable[[], object]] = {
        name: (lambda m=module: m(*arguments)) for name, module in modules.items()
    }
    skipped = {}
    copied = rows * shape.top_k * shape.expert_bytes
    if copied > COPIED:
        skipped["batched_mm"] = f"would copy {copied / 2**30:.0f} GiB"
        del works["batched_mm"]
    fastest = {name: warm(work, pace) for name, work in works.items()}
    if fastest.get("batched_mm", 0.0) > TOO_SLOW * min(fastest.values()):
        skipped["batched_mm"] = f"{fastest['batched_mm'] / min(fastest.values()):.0f} times the fastest"
        del works["batched_mm"]
    found: dict[str, Any] = compare(race(works, pace), [name for name in TRANSFORMERS if name in works])
    return found | {name: {"skipped": why} for name, why in skipped.items()}


def available() -> int:
    """Bytes of memory that the system says can be had."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    raise InputError("/proc/meminfo does not say how much memory is available")


@torch.no_grad()
def bench(shape: Shape, rows: list[int], pace: Pace) -> dict[str, Any]:
    """All variants at each T, and their errors."""
    if available() < shape.needed:
        raise InputError(
            f"this shape needs {shape.needed / 2**30:.1f} GiB and {available() / 2**30:.1f} are free: leave it out "
            "with --shapes, or close something"
        )
    model = one_layer(shape)
    modules = dict(variants(shape, model))
    gc.collect()
    found = errors(shape, model, modules)
    times = {}
    for count in rows:
        times[str(count)] = measure(shape, modules, count, pace)
        short = [f"{name} {v['ratio']:.2f}" for name, v in times[str(count)].items() if "ratio" in v]
        console.note(f"T = {count}: {', '.join(short)}")
    counts = torch.bincount(routing(shape, max(rows))[1].reshape(-1), minlength=shape.experts).numpy()
    return {"errors": found, "times": times, "lis": float(eq.lis(counts))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="demo")
    parser.add_argument("--rows", default="1,8,64,512", help="T, comma-separated")
    parser.add_argument("--seconds", type=float, help="aimed at for each T")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    pace = QUICK if arguments.quick else Pace()
    if arguments.seconds is not None:
        pace = replace(pace, seconds=arguments.seconds)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    shape = SHAPES[arguments.shape]
    found = bench(shape, [int(t) for t in arguments.rows.split(",")], pace)
    console.last_line({"shape": arguments.shape, "threads": torch.get_num_threads(), **found})


if __name__ == "__main__":
    script(main)
