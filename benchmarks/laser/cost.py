"""What LASER adds to a prefill and to a decoding step of the 1.7 GB model of benchmarks/runtime.

    python benchmarks/laser/cost.py [MODEL] [--pairs 15] [--threads 1] [--only "decode 1"]

Without MODEL the model is built (or found) as `benchmarks/runtime/model.py` does. Every layer uses one rule that
reroutes (`--gap`, `--target`), so that nothing is skipped because a threshold says so; the share of tokens moved is
printed.

    prefill       one text of 512 tokens
    decode 1, 8   one token for each of 1 or 8 texts, after 64 tokens of the bundled text each

    deciding      LASER decides in full, and the model goes on with its own choice: what LASER itself costs
    laser         the model goes on with what LASER chose; a balanced batch of a few tokens meets more experts, whose
                  weights one device has to read: `experts` is how many, of E, mean over layers, without and with
    kept          a rule that keeps every top-k: what the hooks cost by themselves

With and without in turn, the order changing from pair to pair; the figures are medians over pairs of the ratio of the
two, with 95 % intervals of the medians (order statistics). In a block's first forward LASER watches every call that the
routers make; it counts in the prefill, while in decoding the first step is left out on both sides.
The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scipy.stats import quantile_test

import equipoise as eq
from equipoise.cli import console
from equipoise.models import load_model
from equipoise.profiling.watching import Observer
from equipoise.rerouting import Rule, Thresholds, installed
from equipoise.rerouting.install import LayerRouting
from equipoise.rerouting.selection import Decision, Vector

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "runtime"))
from model import olmoe_like, text_batches

PREFILL = 512
PROMPT = 64
DECODE = (1, 8)


def cpu_name() -> str:
    """The processor as the kernel names it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class Prefill:
    """One text, whole."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self.model = model
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def seconds(self) -> float:
        """Of one forward."""
        begin = time.perf_counter()
        self.model(**self.inputs, use_cache=False)
        return time.perf_counter() - begin


class Decode:
    """Steps of one token a text, from the same cache each time."""

    def __init__(self, model: Any, ids: torch.Tensor, steps: int) -> None:
        self.model, self.ids, self.steps = model, ids, steps
        prompt = ids[:, :PROMPT]
        self.cache = model(input_ids=prompt, attention_mask=torch.ones_like(prompt), use_cache=True).past_key_values

    def seconds(self) -> float:
        """Of one step, the first left out."""
        cache = copy.deepcopy(self.cache)
        begin = 0.0
        for step in range(1 + self.steps):
            past = PROMPT + step
            mask = torch.ones(len(self.ids), past + 1, dtype=torch.int64)
            token = self.ids[:, past : past + 1]
            self.model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
            begin = begin or time.perf_counter()
        return (time.perf_counter() - begin) / self.steps


class Deciding(LayerRouting):
    """Decides, and goes on with the family's choice."""

    def choose(
        self, scores: torch.Tensor, index: torch.Tensor, before: Vector, real: torch.Tensor | None, logits: bool
    ) -> Decision | None:
        """The family's choice, after the work."""
        decision = super().choose(scores, index, before, real, logits)
        if decision is not None:
            decision.index, decision.scores = index, None
        return decision


def paired(model: Any, work: Any, routing: Callable[[], Any], pairs: int) -> dict[str, float]:
    """Median milliseconds without LASER, median ratio with it and its interval, and the share of tokens moved."""
    plain, ratios, moved = [], [], 0.0
    for pair in range(-1, pairs):
        seconds = {}
        for on in (True, False) if pair % 2 else (False, True):
            with routing() if on else contextlib.nullcontext() as laser:
                seconds[on] = work.seconds()
            if laser is not None:
                moved = float(laser.rerouted.sum() / laser.tokens.sum())
        if pair >= 0:  # the first is a warm-up
            plain.append(seconds[False])
            ratios.append(seconds[True] / seconds[False])
    interval = quantile_test(ratios, p=0.5).confidence_interval(0.95)
    return {
        "ms": 1e3 * statistics.median(plain), "ratio": statistics.median(ratios),
        "low": float(interval.low), "high": float(interval.high), "moved": moved,
    }  # fmt: skip


def experts_met(model: Any, work: Any, routing: Callable[[], Any] | None) -> float:
    """Different experts of a forward, mean over forwards and layers."""
    met: list[int] = []
    note: Observer = lambda row, layer, routed, real: met.append(len(routed.index.unique()))  # noqa: E731
    with routing() if routing else contextlib.nullcontext(), eq.watch(model, note):
        work.seconds()
    return statistics.mean(met)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a directory; without it the model of benchmarks/runtime")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=8, help="decoding steps of one timing")
    parser.add_argument("--gap", type=float, default=0.05)
    parser.add_argument("--target", type=float, default=1.2)
    parser.add_argument("--threads", type=int, default=1)
    works = ("prefill", *(f"decode {rows}" for rows in DECODE))
    parser.add_argument("--only", nargs="+", choices=works, default=works, metavar="WORK", help=", ".join(works))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = arguments.model or olmoe_like()
    loaded = load_model(path)
    model = loaded.model
    text: dict[str, Any] = {}
    if "prefill" in arguments.only:
        text["prefill"] = Prefill(model, text_batches(loaded, 1, PREFILL, 1)[0]["input_ids"])
    for rows in DECODE:
        if f"decode {rows}" in arguments.only:
            ids = text_batches(loaded, rows, PROMPT + 1 + arguments.steps, 1)[0]["input_ids"]
            text[f"decode {rows}"] = Decode(model, ids, arguments.steps)
    moves = Thresholds.of(model, Rule(gap=arguments.gap, extra=6, target=arguments.target))
    modes: dict[str, Callable[[], Any]] = {
        "deciding": lambda: installed(model, moves, routing=Deciding),
        "laser": lambda: installed(model, moves),
        "kept": lambda: installed(model, Thresholds.of(model, Rule())),
    }
    result: dict[str, dict[str, Any]] = {}
    for name, work in text.items():
        result[name] = {mode: paired(model, work, routing, arguments.pairs) for mode, routing in modes.items()}
        result[name]["experts"] = [experts_met(model, work, None), experts_met(model, work, modes["laser"])]
        console.note(f"{name}: {result[name]}")
    console.table(
        f"Time with LASER / without, {path}, {arguments.threads} thread(s), {cpu_name()}",
        ("", "without, ms", "deciding", "laser", "kept", "moved", "experts"),
        [
            (
                name,
                f"{row['laser']['ms']:.2f}",
                *("{ratio:.3f} [{low:.3f}, {high:.3f}]".format(**row[mode]) for mode in modes),
                f"{row['laser']['moved']:.1%}",
                "{:.1f} -> {:.1f}".format(*row["experts"]),
            )
            for name, row in result.items()
        ],
    )
    console.last_line(
        {
            "model": str(path),
            "threads": arguments.threads,
            "processor": cpu_name(),
            "pairs": arguments.pairs,
            "time": result,
        }
    )


if __name__ == "__main__":
    main()
