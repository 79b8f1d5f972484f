"""Wrong input on the command line: exit 2, one line on stderr that says what and where, and nothing written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from core_models import write_text
from equipoise.checkpoint import stream
from equipoise.cli.main import run
from tiny import FAMILIES, save_tiny, tiny_tokenizer

SMALL = ("--seq-len", "16", "--batch-size", "4", "--importance-tokens", "128", "--max-tokens", "512")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, text, a profile and a plan, and much that is wrong."""
    root = tmp_path_factory.mktemp("made")
    save_tiny(FAMILIES["mixtral"](), root / "model")
    save_tiny(FAMILIES["olmoe"](), root / "other")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    save_tiny(LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=2, **small)), root / "dense")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_key_value_heads": 2}
    jetmoe = AutoConfig.for_model(
        "jetmoe", kv_channels=8, num_local_experts=4, vocab_size=128, dtype="float32", **sizes
    )
    jetmoe.save_pretrained(root / "jetmoe")
    tiny_tokenizer().save_pretrained(root / "jetmoe")
    (root / "hollow").mkdir()
    (root / "broken").mkdir()
    (root / "broken" / "config.json").write_text("{")
    (root / "unknown").mkdir()
    (root / "unknown" / "config.json").write_text('{"model_type": "moe_of_tomorrow"}')
    shutil.copytree(root / "model", root / "weightless")
    (root / "weightless" / "model.safetensors").unlink()
    shutil.copytree(root / "model", root / "cut")
    weights = (root / "cut" / "model.safetensors").read_bytes()
    (root / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    shutil.copytree(root / "model", root / "wide")
    config = json.loads((root / "wide" / "config.json").read_text(encoding="utf-8"))
    config["intermediate_size"] = 24
    (root / "wide" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copytree(root / "model", root / "holes")
    tensors = load_file(root / "holes" / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    save_file(tensors, root / "holes" / "model.safetensors", {"format": "pt"})
    shutil.copytree(root / "model", root / "expertless")
    del tensors[next(name for name in tensors if "experts.3" in name and "layers.1" in name)]
    save_file({**tensors, "lm_head.weight": head}, root / "expertless" / "model.safetensors", {"format": "pt"})
    shutil.copytree(root / "model", root / "wordless")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "wordless" / name).unlink()

    write_text(root / "text.txt")
    (root / "empty.txt").write_text("")
    (root / "blank.jsonl").write_text('{"text": "  "}\n\n')
    (root / "field.jsonl").write_text('{"txt": "w5"}\n')
    (root / "number.jsonl").write_text('{"text": 5}\n')
    (root / "list.jsonl").write_text("[1]\n")
    (root / "not.jsonl").write_text('{"text": "w5"}\n{"text": \n')
    (root / "latin.txt").write_bytes("w5 w6 caf\xe9".encode("latin-1"))
    (root / "short.txt").write_text("w5")
    (root / "few.txt").write_text("w5 w6 w7 w8")
    (root / "text.md").write_text("w5 w6")
    (root / "bad.jsonl.gz").write_bytes(b"\x1f\x8b no gzip")

    out = root / "profile.npz"
    assert run(["profile", str(root / "model"), "--data", str(root / "text.txt"), "--out", str(out), *SMALL]) == 0
    assert run(["plan", str(out), "--out", str(root / "plan.json")]) == 0
    (root / "there").mkdir()
    (root / "there" / "keep").write_text("x")
    (root / "plan-dir.json").mkdir()
    return root


def listing(root: Path) -> dict[str, tuple[int, int]]:
    """Everything below a directory, with size and time of change."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(root))] = (status.st_size, status.st_mtime_ns)
    return found


def refused(root: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    """The arguments, with names of `root` for words that begin with @, are refused as the contract says."""
    words = [str(root / word[1:]) if word.startswith("@") else word for word in arguments]
    before = listing(root)
    capfd.readouterr()
    code = run(words)
    out, err = capfd.readouterr()
    assert code == 2, err
    assert err.startswith("error: "), err
    assert len(err.splitlines()) == 1, err
    assert message in err
    assert out == ""
    assert listing(root) == before


DATA = ("--data", "@text.txt")
OUT = ("--out", "@new")

CASES: list[tuple[list[str], str]] = [
    # The model.
    (["profile", "@nothing", *DATA, *OUT], "no such model"),
    (["profile", "nobody/such-model", *DATA, *OUT], "no such model: nobody/such-model"),
    (["profile", "@text.txt", *DATA, *OUT], "no such model"),
    (["profile", "@hollow", *DATA, *OUT], "holds no config.json"),
    (["profile", "@broken", *DATA, *OUT], "config.json of"),
    (["profile", "@unknown", *DATA, *OUT], "moe_of_tomorrow"),
    (["profile", "@dense", *DATA, *OUT], "'llama' is not a Mixture-of-Experts model"),
    (["profile", "@jetmoe", *DATA, *OUT], "'jetmoe' is not supported"),
    (["profile", "@weightless", *DATA, *OUT], "weights"),
    (["profile", "@cut", *DATA, *OUT], "damaged"),
    (["profile", "@holes", *DATA, *OUT, "--seq-len", "16"], "lm_head.weight"),
    (["profile", "@expertless", *DATA, *OUT, "--seq-len", "16"], "is incomplete or damaged"),
    (["balance", "@expertless", *DATA, *OUT, "--seq-len", "16"], "is incomplete or damaged"),
    (["apply", "@expertless", "@plan.json", *OUT], "lacks weights of model.layers.1"),
    (["profile", "@wide", *DATA, *OUT, "--seq-len", "16"], "do not fit its config.json"),
    (["apply", "@wide", "@plan.json", *OUT], "the slots need"),
    (["profile", "@wordless", *DATA, *OUT], "tokenizer"),
    (["balance", "@nothing", *DATA, *OUT], "no such model"),
    (["balance", "@dense", *DATA, *OUT], "'llama' is not a Mixture-of-Experts model"),
    (["balance", "@jetmoe", *DATA, *OUT], "'jetmoe' is not supported"),
    (["balance", "@weightless", *DATA, *OUT, "--seq-len", "16"], "weights"),
    (["balance", "@cut", *DATA, *OUT, "--seq-len", "16"], "damaged"),
    (["apply", "@dense", "@plan.json", *OUT], "'llama' is not a Mixture-of-Experts model"),
    (["apply", "@jetmoe", "@plan.json", *OUT], "'jetmoe' is not supported"),
    (["apply", "@nothing", "@plan.json", *OUT], "no such model"),
    (["apply", "@weightless", "@plan.json", *OUT], "no safetensors weights"),
    (["apply", "@cut", "@plan.json", *OUT], "safetensors"),
    # The data.
    *(
        ([command, "@model", "--data", data, *OUT, *extra], message)
        for command, extra in (("profile", []), ("balance", ["--seq-len", "16"]))
        for data, message in (
            ("@nothing.txt", "no such data file"),
            ("@empty.txt", "is empty"),
            ("@blank.jsonl", "is empty"),
            ("@field.jsonl", "no field 'text' (its fields: txt)"),
            ("@number.jsonl", "line 1: field 'text' is a int"),
            ("@list.jsonl", "line 1 is not a JSON object"),
            ("@not.jsonl", "line 2 is not JSON"),
            ("@latin.txt", "is not UTF-8"),
            ("@short.txt", "fewer tokens than needed"),
            ("@text.md", "of no known kind"),
            ("@bad.jsonl.gz", "gzip"),
            ("@model", "of no known kind"),
        )
    ),
    (["profile", "@model", *OUT], "give --data"),
    (["balance", "@model", *OUT], "give --data"),
    (["balance", "@model", "--data", "@few.txt", *OUT], "fewer tokens than needed"),
    (["balance", "@model", *DATA, "--heldout", "@short.txt", *OUT, "--seq-len", "16"], "fewer tokens than needed"),
    (["balance", "@model", *DATA, *OUT, "--seq-len", "4096"], "tokens"),
    (["profile", "@model", *DATA, *OUT, "--seq-len", "500"], "longer than the model's 128 positions"),
    # The destination.
    (["profile", "@model", *DATA, "--out", "@plan.json"], "exists already"),
    (["plan", "@profile.npz", "--out", "@plan.json"], "exists already"),
    (["plan", "@profile.npz", "--out", "@plan-dir.json", "--force"], "is a directory"),
    (["plan", "@profile.npz", "--out", "@profile.npz", "--force"], "would be lost"),
    (["plan", "@profile.npz"], "give --out"),
    (["apply", "@model", "@plan.json", "--out", "@there"], "exists already"),
    (["apply", "@model", "@plan.json", "--out", "@model", "--force"], "would be lost"),
    (["balance", "@model", *DATA, "--out", "@there"], "exists already"),
    (["balance", "@model", *DATA, "--out", "@model", "--force"], "would be lost"),
    (["balance", "@model", *DATA, "--out", "@text.txt/run"], "cannot be written"),
    (["profile", "@model", *DATA, "--out", "@" + "n" * 300], "the name is too long"),
    # Options.
    (["plan", "@profile.npz", *OUT, "--budget", "0"], "budget is a multiple"),
    (["plan", "@profile.npz", *OUT, "--budget", "nan"], "budget is a multiple"),
    (["plan", "@profile.npz", *OUT, "--budget", "lots"], "'lots' is not a valid float"),
    (["plan", "@profile.npz", *OUT, "--budget", "0.01"], "budget"),
    (["plan", "@profile.npz", *OUT, "--preset", "paper", "--budget", "0.5"], "raise it"),
    (["plan", "@profile.npz", *OUT, "--max-quantized", "0", "--budget", "0.9"], "budget"),
    (["plan", "@profile.npz", *OUT, "--no-such-option"], "--no-such-option"),
    (["balance", "@model", *DATA, *OUT, "--seq-len", "16", "--budget", "0.01"], "budget"),
    (["balance", "@model", *DATA, *OUT, "--seq-len", "1"], "seq-len must be at least 2"),
    (["balance", "@model", *DATA, *OUT, "--calibration", "1.5"], "calibration is a share"),
    (["balance", "@model", *DATA, *OUT, "--preset", "best"], "'best' is not one of"),
    (["profile", "@model", *DATA, *OUT, "--fraction", "0"], "fraction must be in"),
    (["profil"], "No such command 'profil'"),
    (["profile"], "Missing argument"),
]


def words_of(value: object) -> str:
    """Name of a case: its words, or nothing for the message."""
    return " ".join(value)[:70] if isinstance(value, list) else ""


@pytest.mark.parametrize(("arguments", "message"), CASES, ids=words_of)
def test_refused(made: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str):
    refused(made, capfd, arguments, message)


def edit_plan(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plan: plan.update(changes)


def no_slot(plan: dict[str, Any]) -> None:
    layer = plan["layers"][0]
    keep = [i for i, slot in enumerate(layer["slots"]) if slot[0] != 2]
    layer["slots"], layer["shares"] = ([layer[key][i] for i in keep] for key in ("slots", "shares"))


def grown(plan: dict[str, Any]) -> None:
    """One more slot than was paid for; the bytes it states stay as they are."""
    layer = plan["layers"][0]
    layer["slots"].append([7, layer["slots"][-1][1], 0])
    last = layer["shares"][-1]
    layer["shares"][-1:] = [last / 2, last / 2]


PLANS: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (edit_plan(version=2), "version 2"),
    (edit_plan(format="x"), "format is 'x'"),
    (edit_plan(comment="mine"), "comment: unknown key"),
    (lambda plan: plan["layers"][1].update(note=1), "layers.1.note: unknown key"),
    (lambda plan: plan["layers"][0]["slots"][-1].__setitem__(0, 8), "expert 8 is out of range 0..7"),
    (no_slot, "expert 2 has no slot"),
    (lambda plan: plan["budget"].update(plan_bytes=plan["budget"]["limit_bytes"] + 1), "over budget"),
    (grown, "the plan states"),
    (lambda plan: plan["model"].update(model_type="olmoe"), "made for a model with model_type 'olmoe'"),
    (lambda plan: plan["model"].update(dtype="bfloat16"), "dtype 'bfloat16'"),
    (lambda plan: plan.pop("layers"), "layers: Field required"),
]


@pytest.mark.parametrize(("edit", "message"), PLANS)
def test_plans_refused(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], edit: Callable[[dict[str, Any]], None], message: str
):
    plan = json.loads((made / "plan.json").read_text(encoding="utf-8"))
    edit(plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    refused(tmp_path, capfd, ["apply", str(made / "model"), "@plan.json", *OUT], message)


def test_plan_of_another_model(made: Path, capfd: pytest.CaptureFixture[str]):
    refused(made, capfd, ["apply", "@other", "@plan.json", *OUT], "made for a model with model_type 'mixtral'")


def test_a_balanced_model_is_no_start(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    balanced = str(tmp_path / "balanced")
    assert run(["apply", str(made / "model"), str(made / "plan.json"), "--out", balanced]) == 0
    refused(made, capfd, ["apply", balanced, "@plan.json", *OUT], "is balanced already")
    refused(made, capfd, ["profile", balanced, *DATA, *OUT, *SMALL], "is balanced already")
    refused(made, capfd, ["balance", balanced, *DATA, *OUT, *SMALL], "is balanced already")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": np.ones((3, 7), np.int64)}, "series has shape"),
        ({"counts": np.ones(8, np.int64)}, "counts has 1 axes"),
        ({"counts": np.full((3, 8), np.nan)}, "counts holds NaN"),
        ({"counts": -np.ones((3, 8), np.int64)}, "counts holds negative"),
        ({"counts": np.array([[object()]])}, "pickled arrays"),
        ({"importance_error": np.full((3, 8), np.inf)}, "importance_error holds NaN or inf"),
        ({"expert_bytes_original": np.zeros((3, 8), np.int64)}, "expert_bytes_original must be positive"),
    ],
)
def test_profiles_refused(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
):
    with np.load(made / "profile.npz", allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    np.savez(tmp_path / "profile.npz", **{**arrays, **changes})
    refused(tmp_path, capfd, ["plan", "@profile.npz", *OUT], message)
    refused(tmp_path, capfd, ["score", str(made / "plan.json"), "@profile.npz"], message)


@pytest.mark.parametrize("contents", [b"", b"no profile", b"PK\x03\x04"])
def test_files_that_are_no_profiles(tmp_path: Path, capfd: pytest.CaptureFixture[str], contents: bytes):
    (tmp_path / "profile.npz").write_bytes(contents)
    refused(tmp_path, capfd, ["plan", "@profile.npz", *OUT], "profile")
    refused(tmp_path, capfd, ["plan", "@missing.npz", *OUT], "no such profile")


def test_no_room(made: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(made)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    refused(made, capfd, ["apply", "@model", "@plan.json", *OUT], "not enough room")
    refused(made, capfd, ["balance", "@model", *DATA, *OUT, *SMALL], "not enough room")


def test_disk_full_in_the_middle(made: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[1]))

    monkeypatch.setattr(stream, "save_file", full)
    refused(made, capfd, ["apply", "@model", "@plan.json", *OUT], "No space left on device")
    refused(made, capfd, ["apply", "@model", "@plan.json", "--out", "@there", "--force"], "No space left on device")
    refused(made, capfd, ["balance", "@model", *DATA, *OUT, *SMALL], "No space left on device")


def test_a_layer_without_load_is_kept_as_it_is(made: Path, tmp_path: Path):
    """No error: the plan leaves it alone, and the checkpoint holds it unchanged."""
    with np.load(made / "profile.npz", allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays["counts"][1] = 0
    arrays["series"][:, 1] = 0
    np.savez(tmp_path / "profile.npz", **arrays)
    for preset in ("joint", "paper"):
        plan = tmp_path / f"{preset}.json"
        assert run(["plan", str(tmp_path / "profile.npz"), "--preset", preset, "--out", str(plan)]) == 0
        layers = json.loads(plan.read_text(encoding="utf-8"))["layers"]
        assert layers[1]["slots"] == [[e, "original", 0] for e in range(8)]
        assert len(layers[0]["slots"]) > 8
        assert run(["apply", str(made / "model"), str(plan), "--out", str(tmp_path / preset)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile", "@dense", *DATA, *OUT], "is not a Mixture-of-Experts model"),
        (["plan", "@plan.json", *OUT], "profile"),
    ],
)
def test_refused_by_the_real_program(made: Path, arguments: list[str], message: str):
    words = [str(made / word[1:]) if word.startswith("@") else word for word in arguments]
    before = listing(made)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from equipoise.cli.main import main; main()", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert listing(made) == before
