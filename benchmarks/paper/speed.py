"""Tokens a second of every variant beside the original: prefill of 8 x 64 tokens, and 16 decoding steps of 8 rows.

Two models are held at a time, the original and the variant, and called in turn; the figure is the median over rounds
of the ratio within a round, with the least and the most (benchmarks/runtime/timing.py, `race`). The processor is part
of the figure. This is the reference model on the machine of this run; large experts are in benchmarks/runtime.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import neighbour
from sections import Section, table
from subject import VARIANTS, Subject

from equipoise.models import load_model

ROWS, WIDTH, STEPS = 8, 64, 16


def processor() -> str:
    """Name of the processor, and what of its instructions matters here."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = f"{names[0]}, {len(names)} cores" if names else name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def measure(subject: Subject) -> dict[str, Any]:
    """`processor`, `dtype`, `threads`, and for each variant and kind of step: tokens a second, ratio, least, most."""
    timing = neighbour("runtime", "timing")
    original = load_model(subject.moe, dtype=subject.dtype).model
    text = [token for row in subject.prompts("gsm8k")[:ROWS] for token in row]
    ids = torch.tensor((text * (1 + ROWS * WIDTH // len(text)))[: ROWS * WIDTH]).view(ROWS, WIDTH)
    out: dict[str, Any] = {
        "processor": processor(), "dtype": str(original.dtype), "threads": torch.get_num_threads(), "rows": {},
    }  # fmt: skip
    for variant in VARIANTS[1:]:
        with subject.variant(variant) as loaded:
            out["rows"][variant] = {
                kind: _compare(timing, work, original, loaded.model, ids, tokens, subject.quick)
                for kind, work, tokens in (("prefill", prefill, ROWS * WIDTH), ("decode", decode, ROWS * STEPS))
            }
    return out


@torch.inference_mode()
def prefill(model: Any, ids: torch.Tensor) -> object:
    """One forward over all rows."""
    return model.model(input_ids=ids, use_cache=False)


@torch.inference_mode()
def decode(model: Any, ids: torch.Tensor) -> object:
    """A short prompt and `STEPS` new tokens of every row."""
    return model.generate(
        input_ids=ids[:, :4], attention_mask=torch.ones_like(ids[:, :4]), max_new_tokens=STEPS, min_new_tokens=STEPS,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip


def _compare(
    timing: Any, work: Any, original: Any, model: Any, ids: torch.Tensor, tokens: int, quick: bool
) -> dict[str, float]:
    variants = {"original": lambda: work(original, ids), "variant": lambda: work(model, ids)}
    pace = timing.Pace(seconds=4 if quick else 20, least=3 if quick else 7, most=31, warm_seconds=1)
    for call in variants.values():
        timing.warm(call, pace)
    times = timing.race(variants, pace)
    ratios = np.array(times["original"]) / np.array(times["variant"])
    return {
        "tokens_a_second": tokens / float(np.median(times["variant"])),
        "original_tokens_a_second": tokens / float(np.median(times["original"])),
        "ratio": float(np.median(ratios)),
        "least": float(ratios.min()),
        "most": float(ratios.max()),
    }


def section(values: dict[str, Any], folder: Path, quick: bool) -> Section:
    """A table: tokens a second and the ratio to the original."""
    rows = []
    for variant, kinds in values["rows"].items():
        for kind, own in kinds.items():
            rows.append(
                [
                    f"{variant}, {kind}",
                    f"{own['original_tokens_a_second']:.0f}",
                    f"{own['tokens_a_second']:.0f}",
                    f"{own['ratio']:.2f} ({own['least']:.2f} to {own['most']:.2f})",
                ]
            )
    words = (
        f"{values['processor']}, {values['threads']} threads, {values['dtype'].removeprefix('torch.')}. Above 1 is "
        f"faster than the original, median of rounds (least to most). Prefill of {ROWS} x {WIDTH} tokens; decoding of "
        f"{ROWS} rows."
    )
    if values["dtype"] == "torch.float32":
        words += (
            " This processor has no bfloat16 products, so the run computes in float32 and the packed kernels, which "
            "are for bfloat16 models, do not run: what is seen here is the plain path. Speed on a processor that has "
            "them is in benchmarks/runtime."
        )
    return Section("Speed", words + "\n\n" + table(["", "original, tokens/s", "variant, tokens/s", "ratio"], rows))
