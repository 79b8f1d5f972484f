"""The bundled model and text are what the README says they are."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import equipoise as eq
from equipoise.demo import calibration_text, heldout_text, model_dir
from equipoise.evaluation import batches, evaluate_text, windows
from equipoise.files.text import read_texts
from equipoise.models import find_layers, load_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo():
    return load_model("demo", device="cpu")


def test_weights_fit_the_package():
    assert (model_dir() / "model.safetensors").stat().st_size <= 16_000_000


def test_architecture(demo):
    layers = find_layers(demo.model)
    assert len(layers) >= 4
    assert layers[0].num_experts >= 8
    assert demo.model.config.num_experts_per_tok == 2
    assert demo.model.config.model_type == "mixtral"


def test_texts_are_disjoint_and_of_the_same_domains():
    calibration, heldout = read_texts([calibration_text()]), read_texts([heldout_text()])
    assert {r.domain for r in calibration} == {r.domain for r in heldout}
    assert len({r.domain for r in calibration}) >= 6
    assert not {r.text for r in calibration} & {r.text for r in heldout}
    for records in (calibration, heldout):
        assert 200_000 < sum(len(r.text.encode()) for r in records) < 400_000


def test_every_domain_has_a_licence_noted():
    text = (calibration_text().parent / "LICENSES.md").read_text().lower()
    missing = {r.domain for r in read_texts([calibration_text()])} - set(
        text.replace("`", " ").replace("|", " ").split()
    )
    assert not missing


def test_it_is_a_language_model_with_uneven_routing(demo):
    cut = windows(demo.tokenizer, read_texts([heldout_text()]), 256)[::6]
    with eq.watch(demo.model) as load:
        result = evaluate_text(demo.model, batches(cut, 8, demo.model.config))
    # The training run's own figure on this text is about 33; a uniform guess is 4,096.
    assert 25 < result.perplexity < 45
    assert eq.lis(load.counts).mean() > 1.5


def test_published_figures_say_it_beats_the_five_gram(demo):
    results = json.loads((ROOT / "training/demo/results.json").read_text())
    overall = results["perplexity"]["all scored tokens"]
    assert overall["model"] < 0.8 * overall["ngram"]
    assert results["model"]["bytes"] == (model_dir() / "model.safetensors").stat().st_size
    assert results["model"]["parameters"] == demo.model.num_parameters()
    log = [json.loads(line) for line in (ROOT / "training/demo/log.jsonl").read_text().splitlines()]
    validation = [np.mean(list(row["val_loss"].values())) for row in log if "val_loss" in row]
    assert validation[-1] < validation[0] - 1


@pytest.mark.slow
def test_the_example_runs():
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/balance_in_python.py")], capture_output=True, text=True, check=True
    )
    before, after = (float(line.split("LIS ")[1].split(",")[0]) for line in done.stdout.splitlines()[-2:])
    assert after < 0.75 * before
