"""What the scripts of benchmarks/paper run on a model gives the same where the model is on another device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from script_modules import import_scripts

import equipoise as eq
from equipoise.evaluation.data import Batch
from equipoise.evaluation.perplexity import evaluate_text
from equipoise.options import ProfileOptions
from equipoise.rerouting import calibrate, installed
from pretend_gpu import pretend_gpu, to_gpu
from tiny import VOCAB, build, tiny_tokenizer

paper = import_scripts(
    "paper", "accuracy", "batches", "expert_changes", "expert_predictors", "generation_tasks", "greedy", "prompts",
    "speed", "table2",
)  # fmt: skip
answers, removal = (paper.accuracy.neighbour("reference_moe", name) for name in ("answers", "ablation"))

DRAW = np.random.default_rng(0)
ROWS = [DRAW.integers(4, VOCAB, int(n)).tolist() for n in DRAW.integers(8, 20, 6)]
IDS = torch.tensor([row[:8] for row in ROWS])
TEXT = [Batch(batch, ("a",) * len(batch["input_ids"])) for batch in paper.prompts.batched(IDS.tolist(), 3)]


def observed(model):
    """Predictors of a layer's experts."""
    seen = paper.expert_predictors.observe(model, IDS[:2], [1])
    found = paper.expert_predictors.predict(model.model.layers[1].mlp.experts, seen[1])
    return [found[change][name] for change in found for name in paper.expert_predictors.NAMES]


def changed(model):
    bench = paper.expert_changes.Bench(model, IDS[:3], 1)
    return [paper.expert_changes.singles(bench, change).rise for change in ("int8", "removed")]


def profiled(model):
    made = eq.profile(model, TEXT, ProfileOptions(importance_tokens=48))
    return [made.counts, *made.importance.values()]


def rerouted(model):
    """LASER calibrated and installed."""
    found = calibrate(model, TEXT, max_loss_increase=0.05)
    with installed(model, found.thresholds):
        return [found.increase, *paper.table2.slot_counts(model, ROWS, 1)]


def removed(model):
    found = removal.removal_losses(model, TEXT, 1)
    return [found["whole"], found["removed"]]


def scored(model):
    flat = answers.score_rows(model, ROWS[:3], [[[7, 8], [9]], [[4]], [[5, 6, 7]]])
    return [[value for row in flat for value, _ in row]]


def written(model):
    words = tiny_tokenizer()
    asked = ["w5 w6", "w7 w8 w9"]
    said = paper.greedy.generate(model, words, asked, ["\n"], 4, "w4 w5")
    return [[len(s) + sum(map(ord, s)) for s in said], paper.generation_tasks.log_likelihoods(model, words, asked)]


def timed(model):
    ids = IDS.to(model.device)
    prefilled = paper.speed.prefill(model, ids).last_hidden_state
    return [prefilled.sum().tolist(), paper.speed.decode(model, ids, 8).tolist()]


ANY = {
    "routing": lambda model: [paper.prompts.routing(model, ROWS, 4)],
    "slots": lambda model: paper.table2.slot_counts(model, ROWS, 4),
    "padding": lambda model: paper.batches.pad_routing(model, ROWS, "left", 0, 3),
    "text": lambda model: [evaluate_text(model, TEXT).nll],
    "laser": rerouted,
    "answers": scored,
    "written": written,
    "timed": timed,
}
ORIGINAL = {"changed": changed, "predictors": observed, "profile": profiled, "removed": removed}


def mixtral(dtype=torch.float32, precision=None):
    model = build("mixtral", dtype=dtype)
    model.set_attn_implementation("eager")
    if precision:
        profile = eq.profile(model, TEXT, ProfileOptions(importance_tokens=48, low_precision=precision))
        eq.apply(model, eq.plan(profile, replicas=2, budget=2.0))
    return model


PLANS = {"original": (), "float16 slots": (torch.float32, "float16"), "int8 slots": (torch.bfloat16, "int8")}
CASES = [(work, plan) for work in ANY | ORIGINAL for plan in PLANS if work in ANY or plan == "original"]


@pytest.mark.parametrize(("work", "plan"), CASES)
def test_another_device_gives_the_same(work, plan):
    expected = (ANY | ORIGINAL)[work](mixtral(*PLANS[plan]))
    with pretend_gpu():
        found = (ANY | ORIGINAL)[work](to_gpu(mixtral(*PLANS[plan])))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-5, atol=1e-7)


def test_the_pretended_device_refuses_what_a_device_refuses():
    with pretend_gpu():
        there = torch.ones(2).to("cuda")
        assert there.device.type == "cuda"
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(2)
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
        with pytest.raises(RuntimeError, match="for generator"):
            torch.multinomial(there, 1, generator=torch.Generator())
        assert (there.cpu() + torch.ones(2)).tolist() == (there + 1).tolist() == [2, 2]
