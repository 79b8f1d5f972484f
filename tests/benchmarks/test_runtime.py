"""benchmarks/runtime on tiny shapes: it runs, its line is well formed, and what it compares computes the same thing."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import equipoise as eq
from core_models import fresh_process
from equipoise.models import find_layers, load_model
from equipoise.runtime import expert_bytes
from equipoise.types import Slot

HERE = Path(__file__).parents[2] / "benchmarks" / "runtime"
NAMES = ("timing", "plans", "model", "blocks", "whole", "loading", "report", "run", "gpu_report", "gpu")


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The modules of the benchmark, which are scripts of one folder; nothing of them is left in `sys.modules`."""
    kept = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    sys.path.insert(0, str(HERE))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(HERE))
        for name in NAMES:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


@pytest.fixture(scope="module")
def small(bench: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The OLMoE-like model with two small layers."""
    sizes = bench.model.Sizes(hidden=64, intermediate=32, experts=16, top_k=4, layers=2)
    return bench.model.olmoe_like(tmp_path_factory.mktemp("work"), sizes)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HERE / "run.py"), *arguments], capture_output=True, text=True, timeout=240
    )


def test_ratios_are_taken_round_by_round_against_the_best_baseline(bench: SimpleNamespace):
    times = {"a": [1.0, 4.0, 2.0], "b": [2.0, 2.0, 2.0], "ours": [0.5, 1.0, 4.0]}
    found = bench.timing.compare(times, ["a", "b"])
    assert found["ours"] == {"ms": 1000, "ratio": 2.0, "min": 0.5, "max": 2.0, "rounds": 3}
    assert found["a"]["ratio"] == 1.0
    assert found["a"]["min"] == 0.5


def test_a_race_calls_every_variant_equally_often(bench: SimpleNamespace):
    calls = {"a": 0, "b": 0}

    def work(name: str) -> Any:
        def call() -> None:
            calls[name] += 1

        return call

    pace = bench.timing.Pace(seconds=0.0, least=3, most=5)
    times = bench.timing.race({name: work(name) for name in calls}, pace)
    assert calls["a"] == calls["b"]
    assert [len(t) for t in times.values()] == [3, 3]


def test_replicas_of_the_busy_are_paid_for_by_the_idle(bench: SimpleNamespace):
    slots = bench.plans.quarter_low([5, 1, 9, 3, 7, 0, 8, 2])
    assert [s.expert for s in slots if s.precision == "int8" and s.share == 1] == [1, 5]
    assert [s.expert for s in slots if s.share == 0.5] == [2, 2, 6, 6]
    cost = {"original": 2, "int8": 1}
    assert sum(cost[s.precision] for s in slots) == 8 * 2
    assert sorted({s.expert for s in slots}) == list(range(8))


@torch.no_grad()
def test_a_twin_shares_weights_and_a_plan_leaves_the_model_alone(bench: SimpleNamespace, small: Path):
    model = load_model(small, device="cpu").model
    ids = torch.arange(3, 19)[None]
    wanted = model(input_ids=ids).logits
    before = expert_bytes(model)
    other = bench.plans.twin(model)
    assert other.get_input_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert torch.equal(other(input_ids=ids).logits, wanted)
    low = bench.plans.balanced(model, bench.whole.all_int8(model))
    assert expert_bytes(low) != before == expert_bytes(model)
    assert torch.equal(model(input_ids=ids).logits, wanted)


@torch.no_grad()
def test_the_model_is_written_once_and_loaded_unevenly(bench: SimpleNamespace, small: Path):
    stamp = (small / "config.json").stat().st_mtime_ns
    sizes = bench.model.Sizes(hidden=64, intermediate=32, experts=16, top_k=4, layers=2)
    assert bench.model.olmoe_like(small.parent, sizes) == small
    assert (small / "config.json").stat().st_mtime_ns == stamp
    loaded = load_model(small, device="cpu")
    with eq.watch(loaded.model) as load:
        for batch in bench.model.text_batches(loaded, 2, 128, 2):
            loaded.model(**batch, use_cache=False)
    assert load.counts.sum(1).tolist() == [2 * 2 * 128 * 4] * 2
    assert (eq.lis(load.counts) > 1.2).all()
    again = bench.model.random_model(sizes, len(loaded.tokenizer))
    for ours, theirs in zip(loaded.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_decoding_starts_again_at_the_prompt(bench: SimpleNamespace, small: Path):
    model = load_model(small, device="cpu").model
    ids = torch.arange(bench.whole.PROMPT + bench.whole.ANSWER)[None] + 3
    decoder = bench.whole.Decoder(model, ids, model)
    decoder(), decoder()
    assert decoder.cache.get_seq_length() == bench.whole.PROMPT + 2 * bench.whole.CHUNK
    decoder.rewind()
    decoder.rewind()
    assert decoder.cache.get_seq_length() == bench.whole.PROMPT
    rounds = bench.whole.decode_times({"a": model, "b": model}, ids, passes=1)
    assert [len(r) for r in rounds.values()] == [bench.whole.ANSWER // bench.whole.CHUNK] * 2


@torch.no_grad()
def test_what_is_compared_computes_the_same(bench: SimpleNamespace):
    shape = bench.blocks.SHAPES["tiny"]
    model = bench.blocks.one_layer(shape)
    modules = dict(bench.blocks.variants(shape, model))
    errors = bench.blocks.errors(shape, model, modules)
    assert set(errors) == {"eager", "batched_mm", "grouped_mm", "no_plan", "bf16", "int8_25", *bench.plans.LOW}
    for name, error in errors.items():
        assert 0 < error < (0.05 if "int8" in name else 0.01), name
    assert errors["int8"] > errors["bf16"]


def test_memory_is_held_against_the_bytes_of_the_whole_model(bench: SimpleNamespace, small: Path):
    model = load_model(small, device="cpu").model
    plan = bench.plans.plan_of_slots(model, lambda _, layer: [Slot(e) for e in range(layer.num_experts)])
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    assert plan.budget.plan_bytes + bench.loading.rest_bytes(model) == whole
    assert len(find_layers(model)) == 2
    found = fresh_process(bench.loading.FRESH, small, 1)
    assert found.returncode == 0, found.stderr
    line = json.loads(found.stdout.splitlines()[-1])
    assert line["load"] > 0
    assert line["first"] > 0
    assert line["used"]["VmRSS"] > whole // 2


def test_one_command_ends_with_one_line(tmp_path: Path):
    done = run("--quick", "--parts", "blocks", "--shapes", "tiny", "--rows", "1,8", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    (block,) = line["blocks"]
    assert (block["shape"], block["threads"]) == ("tiny", 1)
    assert set(block["ratios"]) == {"1", "8"}
    for row in block["ratios"].values():
        assert {"eager", "batched_mm", "grouped_mm", "no_plan", "bf16", "int8_25", "int8"} <= set(row)
        assert all(ratio > 0 for ratio in row.values())
    assert line["bars"]["block, no plan"]["where"].startswith("tiny")
    assert line["bars"]["watch"]["met"] is None
    assert line["processor"]["cores"] >= 1
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["blocks"][0]["times"]["8"]["int8"]["rounds"] >= 7
    assert (tmp_path / "blocks.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--shapes", "e65"], "--shapes: e65 is not one of"), (["--parts", ","], "--parts: nothing is not one of")],
)
def test_wrong_input_is_one_line(
    bench: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
):
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", *arguments])
    with pytest.raises(SystemExit) as caught:
        bench.timing.script(bench.run.main)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_kernels_are_asked_for_inside_the_block(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(bench.gpu.VARIABLE, raising=False)
    with bench.gpu.kernels("torch"):
        assert os.environ[bench.gpu.VARIABLE] == "torch"
        with bench.gpu.kernels("triton_all"), bench.gpu.kernels(None):
            assert os.environ[bench.gpu.VARIABLE] == "triton_all"
        assert os.environ[bench.gpu.VARIABLE] == "torch"
    assert bench.gpu.VARIABLE not in os.environ


def test_what_a_context_adds_is_measured_inside_it(bench: SimpleNamespace):
    inside = []

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        inside.append(True)
        yield
        inside.pop()

    found = bench.gpu.paired(context, lambda: time.sleep(0.06 if inside else 0.001), pairs=3)
    assert found["pairs"] == 3
    assert 0.3 < found["min"] <= found["cost"] <= found["max"]


@torch.no_grad()
def test_a_time_box_names_what_it_leaves_out(bench: SimpleNamespace, tmp_path: Path):
    run = bench.gpu.Run(torch.device("cpu"), 1000.0, tmp_path)
    bench.gpu.block(run, "tiny", bench.blocks.SHAPES["tiny"], [1])
    run.limit = 0.0
    assert not run.may("block e8")
    run.keep()
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert {"eager", "batched_mm", "grouped_mm", "bf16", "int8_25", "int8"} <= set(kept["blocks"]["tiny"]["times"]["1"])
    text = bench.gpu_report.document(kept)
    assert "# Runtime on CPU" in text
    assert "Left out, no time: block e8." in text
    assert f"{kept['blocks']['tiny']['errors']['int8']:.4f}" in text


def test_more_routings_have_the_same_taste(bench: SimpleNamespace):
    shape = bench.blocks.SHAPES["e64"]
    loads = [torch.bincount(bench.blocks.routing(shape, 512, seed)[1].flatten(), minlength=64) for seed in (1, 2)]
    assert not torch.equal(*loads)
    assert torch.corrcoef(torch.stack(loads).float())[0, 1] > 0.5
