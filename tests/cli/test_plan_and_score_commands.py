import json

import numpy as np
import pytest

from equipoise.cli.main import run
from equipoise.files import load_plan, save_profile
from equipoise.types import Profile


@pytest.fixture
def trace(tmp_path):
    rng = np.random.default_rng(0)
    ids = np.stack(
        [rng.choice(16, 2, replace=False, p=p) for p in [rng.dirichlet(np.full(16, 0.4))] for _ in range(3000)]
    )
    ids = np.stack([ids, (ids + 3) % 16], axis=1)
    counts = np.stack([np.bincount(ids[:, i].ravel(), minlength=16) for i in range(2)])
    path = tmp_path / "trace.npz"
    save_profile(Profile(counts, np.arange(2), {"top_k": 2, "model": "t"}, topk_ids=ids.astype(np.int16)), path)
    return path


def last(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_plan_then_score_held_out(trace, tmp_path, capsys):
    out = tmp_path / "plan.json"
    arguments = ["plan", str(trace), "--tokens", "0:10%", "--replicas", "4", "--budget", "1.0", "--expert-bytes", "100"]
    assert run([*arguments, "--out", str(out)]) == 0
    made = last(capsys)
    assert made["replicas"] == 8
    assert made["bytes_plan"] <= made["bytes_limit"] == 2 * 16 * 100
    assert {"quantized", "predicted_lis", "seconds"} <= made.keys()
    assert load_plan(out).num_replicas == 8
    assert run(["score", str(out), str(trace), "--tokens", "10%:", "--window", "512"]) == 0
    found = last(capsys)
    assert found["windows"] == 5
    assert found["lis_oracle"] <= found["lis"] < 0.8 * found["lis_raw"]
    assert found["rank_imbalance"] == 1.0


def test_ranks_moves_and_front(trace, tmp_path, capsys):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    assert run(["plan", str(trace), "--ranks", "4", "--slots", "20", "--out", str(first)]) == 0
    assert last(capsys)["rank_imbalance"] < 1.05
    arguments = ["plan", str(trace), "--ranks", "4", "--slots", "20", "--from", str(first), "--front"]
    assert run([*arguments, "--out", str(second)]) == 0
    found = last(capsys)
    assert found["moved_bytes"] == 0
    assert any(p["chosen"] for p in found["front"])
    assert (tmp_path / "b.front.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --out"),
        (["--out", "trace.npz"], "exists already"),
        (["--out", "p.json", "--steps", "0:1"], "use --tokens"),
        (["--out", "p.json", "--budget", "0.2"], "give at least 0.5"),
        (["--out", "p.json", "--budget", "nan"], "budget"),
        (["--out", "p.json", "--preset", "paper"], "importance 'wanda'"),
        (["--out", "p.json", "--preset", "paper", "--importance", "frequency", "--front"], "has no front"),
        (["--out", "p.json", "--ranks", "3", "--nodes", "2"], "divisible by nodes"),
        (["--out", "p.json", "--from", "absent.json"], "no such plan"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(trace, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(["plan", "trace.npz", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert message in error
    assert not (tmp_path / "p.json").exists()
