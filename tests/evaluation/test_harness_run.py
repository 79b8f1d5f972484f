"""The harness end to end on tiny random models, offline, against scores worked out by hand."""

import json
import socket

import numpy as np
import pytest
import task_rows
import torch
from tiny_eval_models import byte_tokenizer, tiny_mixtral, tiny_switch

from equipoise.errors import InputError
from equipoise.evaluation.harness import load_tasks, run_tasks
from equipoise.models import load_model
from equipoise.options import EvalOptions

pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")

ALL = ["piqa", "hellaswag", "winogrande", "truthfulqa_mc1", "truthfulqa_mc2", "arc_easy", "arc_challenge",
       "lambada_openai", "wikitext", "mmlu_virology"]  # fmt: skip


@pytest.fixture
def offline(monkeypatch):
    """No connection can be made."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("something asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def loaded(mixtral_dir):
    return load_model(mixtral_dir, device="cpu")


def _score(loaded, context, continuation):
    """(log-likelihood, is it what greedy decoding writes) of bytes after bytes, unbatched."""
    ids = loaded.tokenizer(context)["input_ids"] + loaded.tokenizer(continuation, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    n = len(loaded.tokenizer(continuation, add_special_tokens=False)["input_ids"])
    target = torch.tensor(ids[-n:])
    rows = logits[-n - 1 : -1]
    return rows[torch.arange(n), target].sum().item(), bool((rows.argmax(-1) == target).all())


def test_multiple_choice_is_what_the_model_says(loaded, task_data, offline):
    run = run_tasks(loaded, load_tasks(["piqa"], task_data), EvalOptions(batch_size=2))
    right, right_norm = [], []
    for row in task_rows.PIQA:
        choices = [row["sol1"], row["sol2"]]
        scores = np.array([_score(loaded, f"Question: {row['goal']}\nAnswer:", " " + c)[0] for c in choices])
        right.append(scores.argmax() == row["label"])
        right_norm.append((scores / [len(c) for c in choices]).argmax() == row["label"])
    assert run.measures["piqa"]["acc"].values.tolist() == right
    assert run.measures["piqa"]["acc_norm"].values.tolist() == right_norm
    assert run.fewshot == {"piqa": 0}
    assert run.cut == 0


def test_last_words_and_bytes(loaded, task_data, offline):
    run = run_tasks(loaded, load_tasks(["lambada_openai", "wikitext"], task_data), EvalOptions(batch_size=3))
    texts = [row["text"].rsplit(" ", 1) for row in task_rows.LAMBADA]
    scores = [_score(loaded, start, " " + word)[0] for start, word in texts]
    assert run.measures["lambada_openai"]["perplexity"].value == pytest.approx(np.exp(-np.mean(scores)), rel=1e-4)
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    likelihood = size = 0
    for row in task_rows.WIKITEXT_RAW:
        # the harness puts bos before the text and scores what the tokenizer gives, its own bos included
        likelihood += _score(loaded, "", "<s>" + wikitext_detokenizer(row))[0]
        size += len(row["page"].encode())
    assert run.measures["wikitext"]["byte_perplexity"].value == pytest.approx(np.exp(-likelihood / size), rel=1e-4)
    bits = -likelihood / size / np.log(2)
    assert run.measures["wikitext"]["bits_per_byte"].value == pytest.approx(bits, rel=1e-4)
    assert run.measures["wikitext"]["bits_per_byte"].higher_is_better is False


def test_values_are_those_of_the_harness(loaded, task_data, offline, monkeypatch, capsys):
    from lm_eval import evaluator

    kept = {}
    evaluate = evaluator.evaluate

    def keep(*args, **kwargs):
        kept.update(evaluate(*args, **(kwargs | {"bootstrap_iters": 0})))
        return kept

    monkeypatch.setattr(evaluator, "evaluate", keep)
    seen = {}

    def track(items, total, what):
        for item in items:
            yield item
            seen[what] = seen.get(what, 0) + 1

    tasks = load_tasks(ALL, task_data)
    run = run_tasks(loaded, tasks, EvalOptions(batch_size=4), track)
    assert set(run.measures) == set(ALL)
    for name in ALL:
        for metric, measure in run.measures[name].items():
            assert measure.value == pytest.approx(kept["results"][name][f"{metric},none"], rel=1e-9), (name, metric)
            assert len(measure.values) == kept["n-samples"][name]["effective"]
    # the long prompts of truthfulqa do not fit 256 positions; both questions, 2 + 3 answers
    assert run.cut == 5
    choices = 2 * 3 + 4 * 2 + 2 * 2 + 2 + 3 + 7 + 7 + 4 * 3
    assert seen["answers"] == choices + len(task_rows.LAMBADA)
    assert seen["windows of text"] == 2
    assert capsys.readouterr().out == ""
    assert run.pooled().kind == "share"
    assert len(run.pooled().values) == 3 + 2 + 2 + 1 + 1 + 2 + 2 + 2 + 3


def test_groups_weigh_tasks_by_size(loaded, tmp_path, offline):
    from test_task_files import _mmlu_for_all

    directory = _mmlu_for_all(tmp_path / "data")
    run = run_tasks(loaded, load_tasks(["mmlu"], directory), EvalOptions(batch_size=16))
    assert len(run.groups["mmlu"]) == 57
    values = np.concatenate([run.measures[name]["acc"].values for name in run.groups["mmlu"]])
    assert run.measures["mmlu"]["acc"].value == pytest.approx(values.mean())
    assert len(run.measures["mmlu"]["acc"].values) == 57
    assert sum(len(run.measures[f"mmlu_{part}"]["acc"].values) for part in
               ("stem", "other", "humanities", "social_sciences")) == 57  # fmt: skip
    assert len(run.pooled().values) == 57


def test_limit_and_generation(offline, tmp_path):
    model = tiny_mixtral(positions=1024)
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    loaded = load_model(tmp_path / "m", device="cpu")
    with torch.no_grad():  # always the same digit: greedy decoding writes 22222...
        loaded.model.lm_head.weight.zero_()
        loaded.model.lm_head.weight[loaded.tokenizer.convert_tokens_to_ids("2")] = 0.01
        loaded.model.model.norm.weight.copy_(torch.zeros(32))
        loaded.model.lm_head.bias = torch.nn.Parameter(torch.zeros(259))
        loaded.model.lm_head.bias[loaded.tokenizer.convert_tokens_to_ids("2")] = 1.0
    data = task_rows.write_task_data(tmp_path / "data")
    answers = [
        {"question": f"{i}?", "answer": f"#### {digits}"} for i, digits in enumerate(["2" * 256, "2", "2" * 256])
    ]
    (data / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    loaded.model.generation_config.max_new_tokens = 8  # the task's 256 go before the checkpoint's own
    run = run_tasks(loaded, load_tasks(["gsm8k", "piqa"], data), EvalOptions(limit=2))
    assert loaded.model.generation_config.max_new_tokens == 8
    assert run.fewshot["gsm8k"] == 5
    # 256 times "2" is a number, though "####" does not stand before it
    assert run.measures["gsm8k"]["exact_match,flexible-extract"].values.tolist() == [1.0, 0.0]
    assert run.measures["gsm8k"]["exact_match,strict-match"].values.tolist() == [0.0, 0.0]
    assert len(run.measures["piqa"]["acc"].values) == 2


def test_no_room_to_generate_is_refused(loaded, task_data):
    with pytest.raises(InputError, match=r"gsm8k writes up to 256 tokens, but .* has only 256 positions"):
        run_tasks(loaded, load_tasks(["gsm8k"], task_data), EvalOptions())


def test_encoder_decoder(task_data, tmp_path, offline):
    switch = tiny_switch()
    switch.save_pretrained(tmp_path / "s")
    byte_tokenizer(bos=False).save_pretrained(tmp_path / "s")
    loaded = load_model(tmp_path / "s", device="cpu")
    run = run_tasks(loaded, load_tasks(["piqa"], task_data), EvalOptions(batch_size=1))
    right = []
    for row in task_rows.PIQA:
        source = torch.tensor([loaded.tokenizer(f"Question: {row['goal']}\nAnswer:")["input_ids"]])
        scores = []
        for choice in (row["sol1"], row["sol2"]):
            labels = torch.tensor([loaded.tokenizer(" " + choice)["input_ids"]])
            with torch.no_grad():
                scores.append(-loaded.model(input_ids=source, labels=labels).loss.item() * labels.shape[1])
        right.append(np.argmax(scores) == row["label"])
    assert run.measures["piqa"]["acc"].values.tolist() == right
