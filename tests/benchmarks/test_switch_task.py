import json
from collections import Counter

import numpy as np
import pytest
import torch
from switch_modules import scripts, small_artifact, small_config, small_model, small_wikiqa

from equipoise import InputError

task, finetune, strategies, table1 = scripts.task, scripts.finetune, scripts.strategies, scripts.table1
TOKENIZER = scripts.text.load_tokenizer()


def test_f1_by_hand():
    assert task.token_f1("The cat sat.", "a cat sat") == 1.0
    assert task.token_f1("cat", "dog") == 0.0
    assert task.token_f1("cat cat dog", "cat bird") == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert task.token_f1("", "cat") == 0.0
    assert task.token_f1("the", "a") == 1.0


def test_f1_takes_the_best_reference():
    questions = [task.Question("q", ("one two", "three four five"))]
    assert task.f1(["three four"], questions) == pytest.approx([0.8])


def test_pairs_are_the_right_sentences(tmp_path):
    questions = task.read(small_wikiqa(tmp_path), "dev")
    assert len(questions) == 6
    assert questions[1].answers == (
        "The number 1 is sentence 0 of the dev file .", "The number 1 is sentence 2 of the dev file .",
    )  # fmt: skip
    assert len(task.pairs(questions)) == 7
    known = task.without_a_model(questions, task.read(tmp_path, "test"))
    assert 0 < known["answer of a random training question"] < 1


def test_inputs_and_targets_have_the_form_of_denoising():
    batch = task.inputs_of(["how old is it", "how " * 60], TOKENIZER)
    assert batch["input_ids"].shape == (2, task.INPUT)
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        real = row[mask.bool()].tolist()
        assert real[-2:] == [scripts.text.FIRST_SENTINEL, scripts.text.END]
        assert (row[~mask.bool()] == scripts.text.PAD).all()
    labels = task.targets_of(["it is old", "old " * 200], TOKENIZER)
    assert labels.shape == (2, task.TARGET)
    for row in labels:
        real = row[row != -100].tolist()
        assert real[0] == scripts.text.FIRST_SENTINEL
        assert real[-1] == scripts.text.END


def test_forced_answers_are_shifted_as_transformers_shifts_them():
    (batch,) = task.forced([("how old", "it is old"), ("where", "here")], TOKENIZER)
    labels = task.targets_of(["it is old", "here"], TOKENIZER)
    model = small_model()
    assert torch.equal(batch["decoder_input_ids"], model._shift_right(labels))
    assert torch.equal(batch["decoder_attention_mask"].sum(1), (labels != -100).sum(1))


def test_load_counts_every_token_once_and_no_padding():
    model = small_model(4)
    batches = list(task.forced([("how old is it", "it is old"), ("where", "here")] * 5, TOKENIZER))
    load, slots = task.load_of(model, batches)
    assert load.shape == (2, 4, 4)
    for step, batch in zip(load, batches, strict=True):
        encoder, decoder = int(batch["attention_mask"].sum()), int(batch["decoder_attention_mask"].sum())
        assert step.sum(1).tolist() == [encoder, encoder, decoder, decoder]
    assert all(np.array_equal(slots[i], load[:, i]) for i in range(4))
    with torch.no_grad():
        out = model(**batches[0], output_router_logits=True)
    real = batches[0]["attention_mask"].bool()
    counts = np.bincount(out.encoder_router_logits[0][real].argmax(-1).numpy(), minlength=4)
    assert np.array_equal(counts, load[0, 0])


@pytest.mark.parametrize("name", [s.name for s in strategies.STRATEGIES])
def test_a_strategy_changes_what_it_says(name, tmp_path):
    model = small_model(4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    options = finetune.Options(lr=1e-2, epochs=3, batch=4)
    questions = task.read(small_wikiqa(tmp_path), "dev")
    work = finetune.Task(questions, task.pairs(questions), questions)
    about = finetune.tune(model, strategies.strategy(name), work, TOKENIZER, options)
    changed = dict.fromkeys(("router", "experts", "rest"), False)
    for n, p in model.named_parameters():
        kind = "router" if ".router." in n else "experts" if ".experts." in n else "rest"
        changed[kind] |= not torch.equal(p, before[n])
    wanted = {
        "tune expert": (False, True, False), "tune router": (True, False, False), "tune both": (True, True, False),
        "freeze router": (False, True, True),
    }.get(name, (True, True, True))  # fmt: skip
    assert tuple(changed.values()) == wanted
    assert about["losses"][-1] < about["losses"][0] or name == "tune router"
    assert about["trained"] <= sum(p.numel() for p in model.parameters())


def test_when_routers_are_trained():
    def batches_of(name):
        how = strategies.strategy(name)
        run = [(n // 18, n) for n in range(180)]
        return [
            n for epoch, n in run if how.trains("encoder.block.1.layer.1.mlp.router.classifier.weight", epoch, n, 10)
        ]

    assert batches_of("full") == list(range(180))
    assert batches_of("freeze router") == []
    assert batches_of("freeze router 1 epoch") == list(range(18, 180))
    assert batches_of("tune router 10 %") == list(range(0, 180, 10))
    assert batches_of("tune router last 2 epochs") == list(range(144, 180))
    assert len(strategies.STRATEGIES) == 8
    with pytest.raises(InputError, match="tune router"):
        strategies.strategy("nothing")


def test_an_epoch_sees_every_pair_once():
    seen = Counter()
    numbers = []
    for epoch, number, chosen in finetune.batches(11, finetune.Options(epochs=2, batch=4)):
        numbers.append(number)
        seen.update((epoch, i) for i in chosen)
    assert numbers == list(range(6))
    assert seen == Counter({(epoch, i): 1 for epoch in range(2) for i in range(11)})


def _measured(counts, f1):
    load = np.array(counts)[:, None]
    return finetune.Measured(load, [load[:, 0]], np.array(f1), ["x"] * len(f1), {})


def test_rows_state_changes_with_intervals():
    base = _measured([[4, 0], [4, 0], [2, 2], [4, 0]], [0.0, 0.2, 0.4])
    level = _measured([[2, 2], [2, 2], [2, 2], [2, 2]], [0.1, 0.3, 0.5])
    same, other = table1.rows_of(2, {"Original": base, "full": level})
    assert same["lis"] == pytest.approx(2 * 14 / 16)
    assert other["lis"] == 1.0
    assert other["f1_change"] == pytest.approx(10.0)
    assert other["f1_ci95"] == pytest.approx([10.0, 10.0])
    low, high = other["lis_ci95"]
    assert low <= other["lis_change"] <= high < 0
    (_, again) = table1.rows_of(2, {"Original": base, "full": base})
    assert again["f1_ci95"] == again["lis_ci95"] == [0.0, 0.0]


def test_lis_of_resampled_windows_is_that_of_the_windows_drawn():
    random = np.random.default_rng(1)
    load = random.integers(1, 30, (6, 2, 4))
    found = finetune.Measured(load, [load[:, 0], load[:, 1]], np.zeros(1), [""], {})
    weights = random.integers(0, 3, (5, 6))
    for draw, layers in zip(weights, table1.layer_lis(found, 4, weights), strict=True):
        total = np.repeat(load, draw, axis=0).sum(0)
        assert layers == pytest.approx(4 * total.max(1) / total.sum(1))


def test_the_whole_table_is_made_once(tmp_path, monkeypatch, capsys):
    """Command to JSON on a small untrained model; the second run reads everything back."""
    path = small_artifact(tmp_path / "switch8.safetensors")
    monkeypatch.setattr(scripts.build, "config", small_config)
    monkeypatch.setattr(scripts.artifact, "path_of", lambda experts: path)
    monkeypatch.setattr(task, "TARGET", 8)
    monkeypatch.setattr(finetune, "QUICK", finetune.Options(epochs=1, pairs=4, questions=3))
    data = small_wikiqa(tmp_path)
    command = ["table1.py", "--data", str(data), "--work", str(tmp_path / "work"), "--quick"]
    monkeypatch.setattr("sys.argv", [*command, "--json", str(tmp_path / "first.json")])
    table1.main()
    first = json.loads((tmp_path / "first.json").read_text())
    names = [row["name"] for row in first["rows"]]
    assert names == ["Original", *(s.name for s in strategies.STRATEGIES), "R&Q", "full + R&Q"]
    assert all(f"| {name} |" in first["markdown"] for name in names)
    rows = {row["name"]: row for row in first["rows"]}
    assert rows["R&Q"]["precision"] == ["float16", "original"]
    assert rows["R&Q"]["replicas"] == 4
    assert rows["R&Q"]["bytes"] == 1.0
    assert any("full + R&Q against full" in note for note in first["notes"])
    json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(finetune, "tune", None)
    monkeypatch.setattr(finetune, "measure", None)
    monkeypatch.setattr("sys.argv", [*command, "--json", str(tmp_path / "second.json")])
    table1.main()
    assert json.loads((tmp_path / "second.json").read_text()) == first


def test_a_result_belongs_to_everything_it_depends_on(tmp_path):
    one = small_artifact(tmp_path / "a.safetensors", 4)
    two = small_artifact(tmp_path / "b.safetensors", 8)
    work = finetune.read_task(small_wikiqa(tmp_path), finetune.Options())
    fewer = finetune.read_task(tmp_path, finetune.Options(pairs=3))
    keys = {
        finetune.key(path, found, options, what)
        for path in (one, two)
        for found in (work, fewer)
        for options in (finetune.Options(), finetune.Options(seed=1))
        for what in ("full", "tune router")
    }
    assert len(keys) == 16
    assert finetune.key(one, work, finetune.Options(), "full") in keys
