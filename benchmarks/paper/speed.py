"""Tokens a second of every variant beside the original: prefill of 8 x 64 tokens, and 8 decoding steps of 8 rows.

The quick form has less of each, the large form also a prefill of 32 x 256 tokens. The original and the variant are
called in turn; the figure is the median over rounds of the ratio within a round, with the least and the most
(benchmarks/runtime/timing.py, `race`). Each comparison takes some seconds, and at least `LEAST` rounds, in the quick
form two. On a GPU a call ends when the device is done. The processor is part of the figure, and nothing else should
run on it. This is the reference model on the machine of this run; large experts are in benchmarks/runtime.
"""

from __future__ import annotations

import platform
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accuracy import neighbour
from sections import Section, table
from subject import VARIANTS, Subject

FULL, QUICK = (8, 64, 8), (2, 32, 3)
"""Rows, tokens of a row in prefill, and decoding steps."""
LARGE = (32, 256)
"""Rows and tokens of the large form's prefill."""
LEAST = 5
"""Rounds of a comparison, whatever they take."""


def processor(device: str = "cpu") -> str:
    """Name of the processor, and what of its instructions matters here; the GPU before it where it computes."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = f"{names[0]}, {len(names)} cores" if names else name
    name = f"{name}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{torch.cuda.get_device_name()} beside {name}" if device == "cuda" else name


def machine(device: str) -> str:
    """What a cell is measured on: the processor and the libraries."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, numpy {np.__version__}"
    return f"{processor(device)} ({versions})"


def measure(subject: Subject) -> dict[str, Any]:
    """`processor`, `dtype`, `threads`, and for each variant and kind of step: tokens a second, ratio, least, most."""
    timing = neighbour("runtime", "timing")
    original = subject.copied()
    text = [token for row in subject.prompts("gsm8k") for token in row]
    count, width, steps = QUICK if subject.quick else FULL
    ids = text_ids(text, count, width).to(subject.device)
    kinds: list[tuple[str, Any, torch.Tensor, int]] = [
        ("prefill", prefill, ids, ids.numel()), ("decode", partial(decode, steps=steps), ids, count * steps)
    ]  # fmt: skip
    if subject.large:
        more = text_ids(text, *LARGE).to(subject.device)
        kinds.append((f"prefill, {LARGE[0]} x {LARGE[1]}", prefill, more, more.numel()))
    out: dict[str, Any] = {
        "processor": processor(subject.device.type), "device": subject.device.type, "dtype": str(original.dtype),
        "threads": torch.get_num_threads(), "rows": {},
    }  # fmt: skip
    for variant in VARIANTS[1:]:
        with subject.variant(variant) as loaded:
            out["rows"][variant] = {
                kind: _compare(timing, work, original, loaded.model, ids, tokens, subject.quick)
                for kind, work, ids, tokens in kinds
            }
    return out


def text_ids(text: list[int], rows: int, width: int) -> torch.Tensor:
    """Tokens of a text, repeated where it is too short, as int64 [rows, width]."""
    return torch.tensor((text * (1 + rows * width // len(text)))[: rows * width]).view(rows, width)


@torch.inference_mode()
def prefill(model: Any, ids: torch.Tensor) -> object:
    """One forward over all rows."""
    return model.model(input_ids=ids, use_cache=False)


@torch.inference_mode()
def decode(model: Any, ids: torch.Tensor, steps: int) -> object:
    """A short prompt and `steps` new tokens of every row."""
    return model.generate(
        input_ids=ids[:, :4], attention_mask=torch.ones_like(ids[:, :4]), max_new_tokens=steps, min_new_tokens=steps,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip


def _compare(
    timing: Any, work: Any, original: Any, model: Any, ids: torch.Tensor, tokens: int, quick: bool
) -> dict[str, float]:
    def ended(one: Any) -> None:
        work(one, ids)
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)

    variants = {"original": lambda: ended(original), "variant": lambda: ended(model)}
    pace = timing.Pace(seconds=1 if quick else 3, least=2 if quick else LEAST, most=31, warm_seconds=0.5)
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
    count, width, steps = QUICK if quick else FULL
    words = (
        f"{values['processor']}, {values['threads']} threads, {values['dtype'].removeprefix('torch.')}. Above 1 is "
        f"faster than the original, median of rounds (least to most). Prefill of {count} x {width} tokens where "
        f"nothing else is said; decoding of {steps} tokens of {count} rows."
    )
    if values["device"] == "cpu" and values["dtype"] == "torch.float32":
        words += (
            " This processor has no bfloat16 products, so the run computes in float32. The gain of smaller weights is "
            "larger beside a bfloat16 model, which is slow there: see benchmarks/runtime."
        )
    return Section("Speed", words + "\n\n" + table(["", "original, tokens/s", "variant, tokens/s", "ratio"], rows))
