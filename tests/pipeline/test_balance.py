"""`balance` end to end on tiny models: what it says is true, for both presets and every ablation of the paper."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core_models import write_text
from equipoise import metrics as measures
from equipoise.cli.main import run
from equipoise.files import load_plan, load_profile
from equipoise.models import find_layers, load_model
from equipoise.options import PlanOptions, ProfileOptions
from equipoise.pipeline import BalanceOptions, balance
from equipoise.pipeline.balance import BalanceResult
from equipoise.planning import plan as make_plan
from equipoise.profiling import watch
from equipoise.runtime import expert_bytes
from tiny import FAMILIES, save_tiny

SMALL = ProfileOptions(seq_len=16, batch_size=8, importance_tokens=256)
KEYS = [
    "lis_before",
    "lis_after",
    "lis_after_in_sample",
    "bytes_before",
    "bytes_after",
    "budget",
    "ppl_before",
    "ppl_after",
    "ppl_delta_ci95",
    "replicas",
    "quantized",
    "reload_max_abs_diff",
    "out",
    "seconds",
]
"""Of the last JSON line, as promised."""


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("balance")
    save_tiny(FAMILIES["mixtral"](dtype=torch.bfloat16), root / "mixtral", max_shard_size="40KB")
    save_tiny(FAMILIES["switch_transformers"](), root / "switch")
    write_text(root / "a.txt", documents=60)
    write_text(root / "b.txt", documents=30, seed=9)
    return root


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    """Leave out the fresh process and the pictures, which the full runs have: they take most of a tiny run."""
    module = sys.modules["equipoise.pipeline.balance"]
    monkeypatch.setattr(module, "reload_difference", lambda *_: 0.0)
    monkeypatch.setattr(module, "write_report", lambda run: (run / "report.html").write_text("<html>left out"))


def check_run(out: Path, source: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Everything that can be recomputed from the files of a run directory is what its summary says."""
    assert {p.name for p in out.iterdir()} == {"profile.npz", "plan.json", "model", "metrics.json", "report.html"}
    document = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    summary, layers = document["summary"], document["layers"]
    profile, plan = load_profile(out / "profile.npz"), load_plan(out / "plan.json")
    assert set(KEYS) <= set(summary)
    assert {key: summary[key] for key in KEYS} == {key: result[key] for key in KEYS}

    # Balance, from the counts in the file.
    before = measures.lis(document["heldout_counts"])
    after = [float(measures.slot_lis(s, 8)) for s in document["heldout_slots"]]
    assert summary["lis_before"] == pytest.approx(before.mean())
    assert summary["lis_after"] == pytest.approx(np.mean(after))
    in_sample = [
        float(measures.slot_lis(measures.slot_load(n, layer), 8))
        for n, layer in zip(profile.counts, plan.layers, strict=True)
    ]
    assert summary["lis_after_in_sample"] == pytest.approx(np.mean(in_sample))
    assert summary["lis_before_in_sample"] == pytest.approx(measures.lis(profile.counts).mean())
    for row, layer in enumerate(layers):
        assert (layer["lis_before"], layer["lis_after"]) == pytest.approx((before[row], after[row]))

    # Tokens: what the slots executed is what was routed, no more and no less.
    selections = [sum(n) for n in document["heldout_counts"]]
    assert len({len(n) for n in document["heldout_counts"]}) == 1
    on_low = 0
    for row, (layer, slots) in enumerate(zip(plan.layers, document["heldout_slots"], strict=True)):
        low = sum(n for n, slot in zip(slots, layer.slots, strict=True) if slot.precision != "original")
        assert layers[row]["tokens_quantized"] == pytest.approx(low / max(sum(slots), 1))
        assert layers[row]["replicas"] == len(layer.slots) - 8
        assert layers[row]["quantized"] == layer.quantized().sum()
        on_low += low
    total = sum(sum(s) for s in document["heldout_slots"])
    assert summary["tokens_quantized"] == pytest.approx(on_low / total)
    assert abs(total - sum(selections)) <= 0.02 * total  # routing may flip behind a lower precision

    # Bytes, from the tensors of the checkpoint and of the original.
    original, written = (expert_bytes(load_model(path).model) for path in (source, out / "model"))
    for key, sizes in (("bytes_before", original), ("bytes_after", written)):
        total = sum(sum(layer.values()) for layer in sizes.values())
        assert summary[key] == total == sum(document[key].values()) == sum(layer[key] for layer in layers)
    assert summary["bytes_after"] == plan.budget.plan_bytes
    assert (summary["replicas"], summary["quantized"]) == (plan.num_replicas, plan.num_quantized)
    assert summary["budget"] == pytest.approx(plan.budget.limit_bytes / plan.budget.original_bytes)

    # Perplexity: the change is that of the two figures.
    pooled = next(entry for entry in document["perplexity"] if entry["domain"] == "all")
    assert (summary["ppl_before"], summary["ppl_after"]) == (pooled["before"], pooled["after"])
    assert summary["ppl_delta_pct"] == pytest.approx(100 * (pooled["after"] / pooled["before"] - 1), abs=1e-6)
    low_end, high_end = summary["ppl_delta_ci95"]
    assert low_end <= summary["ppl_delta_pct"] <= high_end
    parts = [entry for entry in document["perplexity"] if entry["domain"] != "all"]
    if parts:
        nats = sum(entry["tokens"] * math.log(entry["before"]) for entry in parts)
        assert pooled["before"] == pytest.approx(math.exp(nats / pooled["tokens"]))
    assert "<html" in (out / "report.html").read_text(encoding="utf-8")[:300].lower()
    return document


@pytest.mark.slow
def test_joint_from_the_command_line(room: Path, capfd: pytest.CaptureFixture[str]):
    """The whole job: table for people, progress nowhere but on stderr, one JSON object last."""
    out = room / "joint"
    data = ["--data", str(room / "a.txt"), "--heldout", str(room / "b.txt")]
    options = ["--seq-len", "16", "--importance-tokens", "256"]
    assert run(["balance", str(room / "mixtral"), *data, "--out", str(out), *options]) == 0
    printed, _ = capfd.readouterr()
    result = json.loads(printed.splitlines()[-1])
    assert "LIS before" in printed
    assert "95 % interval" in printed
    document = check_run(out, room / "mixtral", result)
    assert result["reload_max_abs_diff"] == 0
    assert result["bytes_after"] <= result["bytes_before"]
    assert result["budget"] == 1
    assert result["lis_after"] < result["lis_before"]
    assert result["replicas"] > 0
    assert result["out"] == str(out)
    assert document["options"]["preset"] == "joint"
    assert document["options"]["data"] == "a.txt"

    # The plan is the one that this profile and these options give, and the load before is that of the untouched model.
    assert load_plan(out / "plan.json") == make_plan(load_profile(out / "profile.npz"), PlanOptions())
    network = load_model(room / "mixtral").model
    from equipoise.evaluation.data import batches, windows
    from equipoise.files.text import read_texts
    from equipoise.models.loading import find_source, load_tokenizer

    held = windows(load_tokenizer(find_source(room / "mixtral")), read_texts([room / "b.txt"]), 16)
    with torch.no_grad(), watch(network) as load:
        for batch in batches(held, 8, network.config):
            network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert load.counts.tolist() == document["heldout_counts"]


@pytest.mark.slow
def test_paper_on_switch(room: Path):
    """Encoder-decoder, top-1, float32: float16 copies; the budget is what the algorithm needs, which is no more."""
    made = balance(
        room / "switch",
        room / "paper-switch",
        data=[room / "a.txt"],
        profile_options=SMALL,
        plan_options=PlanOptions(preset="paper"),
    )
    result = made.metrics.summary.model_dump()
    document = check_run(room / "paper-switch", room / "switch", json.loads(json.dumps(result)))
    assert result["reload_max_abs_diff"] == 0
    assert result["bytes_after"] == result["bytes_before"]  # two halves of 32 bits are one whole
    assert set(document["bytes_after"]) == {"original", "float16"}
    for layer in made.plan.layers:
        assert len(layer.slots) == 9
        assert layer.quantized().sum() == 1
    profile = load_profile(room / "paper-switch" / "profile.npz")
    assert profile.counts.sum(1).max() <= profile.meta["tokens"] * 2
    # The paper's protocol: a tenth of the windows calibrates.
    assert document["options"]["calibration"] is None
    assert "first 10%" in document["options"]["data"]


def paper(out: Path, source: Path, room: Path, **options: Any) -> BalanceResult:
    return balance(
        source,
        out,
        data=[room / "a.txt"],
        options=BalanceOptions(calibration=0.5),
        profile_options=SMALL,
        plan_options=PlanOptions(preset="paper", **options),
    )


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("model", ["mixtral", "switch"])
@pytest.mark.parametrize("strategy", ["rq", "quantize-only", "random", "quantize-heavy", "quantize-all"])
def test_every_ablation(room: Path, tmp_path: Path, model: str, strategy: str):
    made = paper(tmp_path / "run", room / model, room, strategy=strategy)
    check_run(tmp_path / "run", room / model, json.loads(json.dumps(made.metrics.summary.model_dump())))
    low = "int8" if model == "mixtral" else "float16"
    profile = load_profile(tmp_path / "run" / "profile.npz")
    for counts, layer in zip(profile.counts, made.plan.layers, strict=True):
        heavy, replicas, quantized = int(counts.argmax()), layer.replicas(), layer.quantized()
        assert {slot.precision for slot in layer.slots} == ({low} if strategy == "quantize-all" else {"original", low})
        if strategy == "rq":
            assert replicas[heavy] == 2
            assert replicas.sum() == 9
            assert quantized.sum() == 1
            assert not quantized[heavy]
        elif strategy == "quantize-only":
            assert replicas.sum() == 8
            assert quantized.sum() == 1
            assert not quantized[heavy]
        elif strategy == "random":
            assert replicas.sum() == 9
            assert quantized.sum() == 1
        elif strategy == "quantize-heavy":
            assert replicas[heavy] == 2
            assert quantized.tolist() == [e == heavy for e in range(8)]
        else:
            assert replicas.sum() == 8
            assert quantized.all()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("importance", ["wanda", "error", "frequency", "random"])
def test_every_importance(room: Path, tmp_path: Path, importance: Any):
    """The expert that is quantized is the least important of the layer by that measure, the heavy hitter apart."""
    made = paper(tmp_path / "run", room / "mixtral", room, importance=importance)
    profile = load_profile(tmp_path / "run" / "profile.npz")
    for row, layer in enumerate(made.plan.layers):
        (victim,) = np.flatnonzero(layer.quantized())
        others = [e for e in range(8) if e != int(profile.counts[row].argmax())]
        if importance == "wanda":  # the paper's reading: a lower score is a more important expert
            assert victim == max(others, key=lambda e: profile.importance["wanda"][row, e])
        elif importance == "error":
            assert victim == min(others, key=lambda e: profile.importance["error"][row, e])
        elif importance == "frequency":
            assert profile.counts[row, victim] == min(profile.counts[row, e] for e in others)
        else:
            assert victim in others


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("budget", [0.75, 1.0, 1.5])
def test_joint_keeps_any_budget(room: Path, tmp_path: Path, budget: float):
    made = balance(
        room / "mixtral",
        tmp_path / "run",
        data=[room / "a.txt"],
        profile_options=SMALL,
        plan_options=PlanOptions(budget=budget),
    )
    summary = made.metrics.summary
    assert summary.bytes_after <= budget * summary.bytes_before
    network = load_model(tmp_path / "run" / "model").model
    assert all(layer.experts.equipoise_slots.table.num_slots >= 8 for layer in find_layers(network))


@pytest.mark.usefixtures("quick")
def test_calibration_and_heldout_share_no_window(room: Path, tmp_path: Path):
    made = balance(
        room / "mixtral",
        tmp_path / "run",
        data=[room / "a.txt", room / "b.txt"],
        options=BalanceOptions(calibration=0.25),
        profile_options=SMALL,
    )
    document = made.metrics
    total = document.summary.model_dump()
    windows = (60 * 60) // 16 + (30 * 60) // 16
    scored = next(entry for entry in document.perplexity if entry.domain == "all")
    assert {entry.domain for entry in document.perplexity} == {"all", "a", "b"}
    assert scored.windows * 16 + total["calibration_tokens"] == windows * 16
    assert total["calibration_tokens"] == pytest.approx(windows * 16 / 4, abs=32)
    assert scored.tokens == scored.windows * 15  # the first token of a window is not scored


@pytest.mark.usefixtures("quick")
def test_bytes_that_disagree_stop_the_run(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A failure of our own in the middle: an error, and no run directory."""
    module = sys.modules["equipoise.pipeline.balance"]
    monkeypatch.setattr(module, "expert_bytes", lambda network: {"x": {"original": 1}})
    with pytest.raises((RuntimeError, KeyError)):
        balance(room / "mixtral", tmp_path / "run", data=[room / "a.txt"], profile_options=SMALL)
    assert list(tmp_path.iterdir()) == []
