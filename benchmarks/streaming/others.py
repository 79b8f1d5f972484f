"""Streams other than the five that are reported: the defaults of the adaptive policy were chosen on these.

Real series and traces of other models (and other texts), the altered-input HarMoEny series for their mechanics, and
streams drawn from the 7-corpora series: regimes of 3 to 8 windows that come back, with bursts (gamma noise, shape
4) and the sampling noise of 512 tokens.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from equipoise.streaming import Stream, load_stream

CORPORA = (
    "deepseek-moe-16b-base_7corpora_series",
    "deepseek-moe-16b-chat_7corpora_series",
    "qwen1.5-moe-a2.7b_7corpora_series",
    "olmoe-1b-7b_7corpora_series",
    "deepseek-v4-flash_8texts_series",
)
SERIES = ("olmoe-1b-7b_olmoe-repo_corpora", "qwen3-30b-a3b_dolly_layers0-4")
HARMOENY = tuple(
    f"{model}_harmoeny_{text}_series"
    for model in ("switch-base-128", "qwen1.5-moe")
    for text in ("wikitext", "bookcorpus", "wmt19")
)
IDS = (
    ("qwen1.5-moe-a2.7b-chat_vllm_gsm8k_topk", 128),
    ("qwen1.5-moe-a2.7b-chat_vllm_gsm8k_topk", 256),
    ("flame-moe-290m_encoder2048_topk", 128),
    ("qwen3-30b-a3b_step_hh-rlhf_b1024_topk", 64),
)


def other_streams(traces: Path) -> dict[str, Stream]:
    """The streams, by name."""
    out = {name: load_stream([traces / f"{name}.npz"]) for name in (*CORPORA, *SERIES, *HARMOENY)}
    for model in ("switch-base-128", "qwen1.5-moe"):
        parts = [out[name].parts for name in HARMOENY if name.startswith(model)]
        blocks = [p[i * 8 : i * 8 + 8] for i in range(2) for p in parts]
        out[f"{model} texts by turns"] = Stream(np.concatenate(blocks))
    rng = np.random.default_rng(0)
    for name in CORPORA:
        out[f"regimes of {name}"] = Stream(_regimes(out[name].windows, rng)[:, None])
    for name, window in IDS:
        out[f"{name} {window}"] = load_stream([traces / f"{name}.npz"], window)
    return out


def _regimes(series: np.ndarray, rng: np.random.Generator, regimes: int = 8) -> np.ndarray:
    """Windows [N, L, E] of 512 x 6 selections drawn from steps of a series that take turns."""
    share = series / series.sum(-1, keepdims=True)
    out = []
    for _ in range(regimes):
        corpus = share[rng.integers(len(share))]
        for _ in range(rng.integers(3, 9)):
            burst = corpus * rng.gamma(4.0, 0.25, corpus.shape)
            out.append([rng.multinomial(512 * 6, row / row.sum()) for row in burst])
    return np.array(out, dtype=np.float64)
