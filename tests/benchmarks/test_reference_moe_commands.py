import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from reference_moe_modules import FOLDER, scripts, tiny_llama, trained_like

from equipoise.errors import InputError
from equipoise.evaluation.data import Batch
from equipoise.evaluation.perplexity import evaluate_text


def test_artifact_round_trip_is_within_half_a_step(tmp_path):
    model, _ = trained_like()
    weights = {name: parameter.detach() for name, parameter in model.trained()}
    scripts.artifact.write(tmp_path / "a.safetensors", weights, {"options": {"top_k": 2}})
    again, about = scripts.artifact.read(tmp_path / "a.safetensors")
    assert about == {"options": {"top_k": 2}}
    assert again.keys() == weights.keys()
    for name, weight in weights.items():
        if name.endswith("router"):
            assert torch.equal(again[name], weight)
        else:
            step = weight.abs().amax(1, keepdim=True) / 127
            assert ((again[name] - weight).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize(("name", "experts", "top_k"), [("artifact", 8, 2), ("artifact-16", 16, 1)])
def test_artifacts_of_the_repository_are_what_they_say(name, experts, top_k):
    path = FOLDER / f"{name}.safetensors"
    weights, about = scripts.artifact.read(path)
    assert path.stat().st_size <= scripts.artifact.LIMIT
    assert (about["options"]["experts"], about["options"]["top_k"]) == (experts, top_k)
    for layer in range(30):
        assert weights[f"{layer}.router"].shape == (experts, 576)
        assert weights[f"{layer}.in_a"].shape == (experts * about["options"]["rank"], 576)
        missing = (~weights[f"{layer}.keep"]).sum(1)
        assert (missing == round(about["options"]["drop"] * 1536)).all()


def test_artifact_above_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(scripts.artifact, "LIMIT", 1000)
    with pytest.raises(InputError, match="lower the rank"):
        scripts.artifact.write(tmp_path / "a.safetensors", {"0.in_a": torch.zeros(64, 64)}, {})
    assert not list(tmp_path.iterdir())


def test_artifact_of_another_shape_is_refused():
    model, dense = trained_like()
    weights = {name: parameter.detach() for name, parameter in model.trained() if not name.startswith("2.")}
    with pytest.raises(InputError, match="does not fit"):
        scripts.build.mixtral(dense, weights, 2)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("build.py", ["--out", "{tmp}/moe", "--artifact", "{tmp}/none.safetensors"], "does not exist"),
        ("accept.py", ["--dense", "{tmp}/none", "--data", "{tmp}", "--out", "{tmp}/out"], "none"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(tmp_path, script, arguments, message):
    command = [sys.executable, FOLDER / script, *(a.format(tmp=tmp_path) for a in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.strip().count("\n") == 0


def streams(rng):
    names = [f"{s}.{part}" for s in scripts.data.STREAMS for part in ("train", "held")]
    tokens = {name: rng.integers(0, 97, 200).astype(np.int32) for name in names}
    return {**tokens, "own": rng.integers(0, 97, (5, 16)).astype(np.int32)}


def test_training_goes_on_from_its_checkpoint(tmp_path):
    """With no budget left `train` makes no step: what it ends with is what it began with."""
    train = scripts.train
    options = train.Options(minutes=0, experts=4, rank=3, length=16, router_windows=2, validate_windows=2, drop=0.25)
    tokens = streams(np.random.default_rng(0))
    model, _ = trained_like()
    loss = scripts.losses.HeadLoss(model.embedding)
    assert train.train(model, loss, tokens, tmp_path, options) == 0
    begun = {name: parameter.detach().clone() for name, parameter in model.trained()}
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state["step"] = 7
    torch.save(state, tmp_path / "checkpoint.pt")
    other, _ = trained_like()
    assert train.train(other, loss, tokens, tmp_path, options) == 7
    assert all(torch.equal(parameter, begun[name]) for name, parameter in other.trained())
    weights, about = scripts.artifact.read(tmp_path / "artifact.safetensors")
    assert about["steps"] == 7
    masks = {f"{n}.keep": layer.keep for n, layer in enumerate(model.layers)}
    assert weights.keys() == begun.keys() | masks.keys()
    for n, layer in enumerate(other.layers):
        assert torch.equal(weights[f"{n}.keep"], masks[f"{n}.keep"])
        assert torch.equal(layer.keep, masks[f"{n}.keep"])
        assert (layer.keep.sum(1) == 48 - round(options.drop * 48)).all()
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [0, 7]
    assert set(entries[0]["held_out"]) == set(scripts.data.STREAMS)


def test_a_budget_of_steps_with_several_windows_of_a_kind(tmp_path):
    train = scripts.train
    options = train.Options(steps=10, scale=2, experts=4, rank=3, length=16, router_windows=2, validate_windows=2)
    tokens = streams(np.random.default_rng(0))
    model, _ = trained_like()
    loss = scripts.losses.HeadLoss(model.embedding)
    assert train.batch(tokens, 0, options).shape == (20, 16)
    assert train.train(model, loss, tokens, tmp_path, options) == 10
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (own,) = [entry for entry in entries if "nll_kl" in entry]
    assert own["step"] == 10
    assert set(own["lis"]) == set(own["nll_kl"]) == set(scripts.recipe.PLAN)
    assert all(1 <= value <= 2 for value in own["lis"].values())  # 4 experts, 2 chosen
    assert own["nll_kl"]["own"][1] > 0  # the streams with a teacher come first, and only they diverge from it
    assert own["nll_kl"]["fiction"][1] == 0
    _, about = scripts.artifact.read(tmp_path / "artifact.safetensors")
    assert about["tokens"] == 10 * 20 * 16


def test_where_training_starts_is_kept(tmp_path):
    begin, options = scripts.begin, scripts.recipe.Options(experts=4, rank=3, length=16, router_windows=2, drop=0.25)
    tokens = streams(np.random.default_rng(0))
    first, _ = trained_like()
    begin.fresh_start(first, tokens, tmp_path, options)
    other, _ = trained_like()
    begin.fresh_start(other, {}, tmp_path, options)  # reads no token
    for one, two in zip(first.layers, other.layers, strict=True):
        assert torch.equal(one.router, two.router)
        assert torch.equal(one.keep, two.keep)
        assert not one.keep.all()
    with pytest.raises(InputError, match="other --experts, --top-k, --drop or seed"):
        begin.fresh_start(other, {}, tmp_path, scripts.recipe.Options(experts=4, drop=0.1))


def test_training_begins_with_an_artifact(tmp_path):
    train = scripts.train
    options = train.Options(minutes=0, experts=4, rank=3, length=16, validate_windows=2, drop=0.25)
    begun, _ = trained_like()
    weights = {name: parameter.detach() for name, parameter in begun.trained()}
    scripts.artifact.write(tmp_path / "begun.safetensors", weights, {"steps": 11})
    stored, _ = scripts.artifact.read(tmp_path / "begun.safetensors")
    model = scripts.model.Upcycled(tiny_llama(), 4, 3, 2)
    loss = scripts.losses.HeadLoss(model.embedding)
    tokens = streams(np.random.default_rng(0))
    assert train.train(model, loss, tokens, tmp_path / "run", options, tmp_path / "begun.safetensors") == 11
    assert all(torch.equal(parameter, stored[name]) for name, parameter in model.trained())
    assert not any(layer.keep.all() for layer in model.layers)  # an artifact of whole experts: they part now


def test_a_step_lowers_the_loss_of_its_own_batch():
    train = scripts.train
    options = train.Options(experts=4, rank=3, length=16, seed=3)
    tokens = streams(np.random.default_rng(1))
    ids = train.batch(tokens, 4, options)
    assert torch.equal(ids, train.batch(tokens, 4, options))
    assert not torch.equal(ids, train.batch(tokens, 5, options))
    dense = tiny_llama()
    model = scripts.model.Upcycled(dense, 4, 3, 2)
    loss = scripts.losses.HeadLoss(model.embedding)
    optimizer = torch.optim.AdamW([p for _, p in model.trained()], lr=1e-3)
    totals = []
    for _ in range(4):
        total, nll, kl, balance, loads = train.losses(model, loss, ids, options.plan)
        totals.append(float(total.detach()))
        optimizer.zero_grad()
        (total + 0.003 * balance).backward()
        optimizer.step()
    assert totals == sorted(totals, reverse=True)
    assert nll.shape == kl.shape == (len(scripts.recipe.PLAN),)
    assert loads.shape == (3, len(scripts.recipe.PLAN), 4)
    assert not kl[4:].any()


def test_packed_answers_score_as_one_at_a_time():
    model = tiny_llama()
    rng = np.random.default_rng(0)
    contexts = [rng.integers(0, 97, n).tolist() for n in (5, 9, 1)]
    answers = [[rng.integers(0, 97, n).tolist() for n in sizes] for sizes in ((3, 1, 4), (2, 2), (6,))]
    packed = scripts.answers.score_rows(model, contexts, answers)
    for context, choices, scores in zip(contexts, answers, packed, strict=True):
        for answer, (value, greedy) in zip(choices, scores, strict=True):
            with torch.no_grad():
                logp = model(torch.tensor([context + answer])).logits[0].log_softmax(-1)[len(context) - 1 : -1]
            wanted = logp.gather(1, torch.tensor(answer)[:, None]).sum()
            assert value == pytest.approx(float(wanted), rel=1e-4)
            assert greedy == (logp.argmax(-1).tolist() == answer)


def test_packed_answers_give_the_harness_its_own_results(tmp_path):
    from equipoise.evaluation.harness import load_tasks, run_tasks
    from equipoise.models import load_model
    from equipoise.options import EvalOptions
    from evaluation.task_rows import write_task_data
    from evaluation.tiny_eval_models import byte_tokenizer, tiny_mixtral

    write_task_data(tmp_path / "data")
    tiny_mixtral().save_pretrained(tmp_path / "model")
    byte_tokenizer(bos=False).save_pretrained(tmp_path / "model")
    loaded = load_model(tmp_path / "model", device="cpu")
    names = ["piqa", "hellaswag", "arc_easy"]
    packed = scripts.answers.accuracy(loaded, names, tmp_path / "data", 0, 2)
    usual = run_tasks(loaded, load_tasks(names, tmp_path / "data"), EvalOptions(batch_size=2))
    for name in names:
        for metric in ("acc", "acc_norm"):
            assert packed[name][metric].values.tolist() == usual.measures[name][metric].values.tolist()


def windows():
    ids = torch.randint(0, 97, (4, 12), generator=torch.Generator().manual_seed(0))
    return [Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ("web", "web", "code", "code"))]


def test_removing_an_expert_is_what_a_model_without_it_does():
    model, dense = trained_like()
    built = scripts.build.mixtral(dense, dict(model.trained()), 2)
    found = scripts.ablation.removal_losses(built, windows(), 1)
    assert found["whole"] == pytest.approx(evaluate_text(built, windows()).nll.tolist(), rel=1e-4)
    assert found["domains"] == ["web", "web", "code", "code"]
    gate = built.model.layers[1].mlp.gate
    for expert in range(4):
        with scripts.ablation.without(gate, expert):
            chosen = gate(torch.randn(50, 32))
            assert not (chosen[2] == expert).any()
            assert torch.allclose(chosen[1].sum(-1), torch.ones(50))
            assert found["removed"][expert] == pytest.approx(evaluate_text(built, windows()).nll.tolist(), rel=1e-4)
    assert len({round(sum(losses), 6) for losses in found["removed"]}) == 4


def test_an_identical_model_is_accepted_on_accuracy_and_refused_on_the_rest():
    accept = scripts.accept
    text = {"nll": [1.0, 2.0] * 7, "tokens": [10] * 14, "domains": [d for d in scripts.data.DOMAINS for _ in (0, 1)]}
    text["counts"] = np.ones((7, 3, 4), dtype=int).tolist()
    answers = {task: {"acc": [0.0, 1.0] * 500, "acc_norm": [1.0, 1.0] * 500} for task in accept.TASKS}
    removal = {"1": {"whole": text["nll"], "removed": [text["nll"]] * 4, "domains": text["domains"]}}
    result = {
        "accuracy": accept.accuracies(answers, answers),
        "perplexity": accept.perplexities(text, text),
        "experts": accept.removals(removal),
        "routing": accept.routing(text["counts"]),
    }
    assert accept.verdict(result) == {"accuracy": True, "perplexity": False, "experts": False, "routing": False}
    few = {task: {metric: values[:100] for metric, values in metrics.items()} for task, metrics in answers.items()}
    assert not accept.verdict({**result, "accuracy": accept.accuracies(few, few)})["accuracy"]
    accept.show(result)


def test_heavy_hitters_are_counted_by_layer():
    counts = np.ones((3, 2, 4), dtype=int)
    counts[:, 0, 2] = 9  # layer 0: the same expert in every domain
    counts[[0, 1, 2], 1, [0, 1, 1]] = 9  # layer 1: two
    found = scripts.accept.routing(counts.tolist())
    assert found["distinct_heavy_hitters"] == [1, 2]
    assert found["layers_that_change"] == 1
