"""Table 9 of the paper benchmark: greedy text in batches, the tasks' items and scores, and the section."""

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from script_modules import import_scripts

from tiny import FAMILIES, VOCAB, tiny_tokenizer

pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")

scripts = import_scripts("paper", "cells", "generation", "generation_tasks", "greedy")
tasks, greedy = scripts.generation_tasks, scripts.greedy


@pytest.fixture(scope="module")
def model():
    return FAMILIES["mixtral"](num_hidden_layers=2, initializer_range=0.5)


@pytest.fixture(scope="module")
def words():
    return tiny_tokenizer()


def texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in rng.integers(3, VOCAB, rng.integers(2, 9))) for _ in range(count)]


def one_by_one(model, words, prompt, most):
    """The most likely token after token, without cache, batch or padding."""
    ids = words(prompt)["input_ids"]
    start = len(ids)
    for _ in range(most):
        with torch.inference_mode():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == words.eos_token_id:
            break
        ids.append(token)
    return words.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("beginning", ["", "w7 w8 w9 w10"])
def test_batched_text_is_that_of_each_prompt_alone(model, words, beginning):
    prompts = texts(5)
    got = greedy.generate(model, words, prompts, [], 6, beginning, batch=3)
    expected = [one_by_one(model, words, f"{beginning} {prompt}".strip(), 6) for prompt in prompts]
    assert got == expected
    assert len(set(got)) > 1


def test_an_answer_ends_at_a_stop_text_and_at_the_end_token(model, words):
    prompts = texts(4)
    free = greedy.generate(model, words, prompts, [], 6)
    stop = free[0].split()[2]
    stopped = greedy.generate(model, words, prompts, [stop], 6)
    assert stopped == [greedy.until(text, [stop]) for text in free]
    assert stopped[0] != free[0]
    ending = SimpleNamespace(eos_token_id=words(free[1].split()[1])["input_ids"][0])
    held = words.eos_token
    try:
        words.eos_token = words.convert_ids_to_tokens(ending.eos_token_id)
        short = greedy.generate(model, words, prompts[1:2], [], 6)[0]
    finally:
        words.eos_token = held
    assert len(short.split()) <= 1


def test_text_likelihood_is_that_of_each_text_alone(model, words):
    rows = texts(5, seed=3)
    got = tasks.log_likelihoods(model, words, rows, batch=2)
    for text, value in zip(rows, got, strict=True):
        ids = torch.tensor([[words.bos_token_id, *words(text)["input_ids"]]])
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        assert value == pytest.approx(float(logits.gather(-1, ids[0, 1:, None]).sum()), rel=1e-5)


def test_a_docstring_is_taken_out_of_its_function():
    code = 'def f(a,\n      b=1):\n    """Add two numbers.\n\n    More.\n    """\n    # sum\n    return a + b\n'
    assert tasks.without_docstring(code) == ("def f(a,\n      b=1):\n    # sum\n    return a + b", "Add two numbers.")
    for strange in ('print "old"', "x = 1", "def f():\n    return 1", 'def f():\n    """Too short."""\n    return 1'):
        assert tasks.without_docstring(strange) is None


def test_scores_are_the_harness_s():
    utils = pytest.importorskip("lm_eval.tasks.truthfulqa.utils")
    item = {"question": "Why?", "truthful": ["It is so. Really.", "Nobody knows."], "false": ["It is not so at all."]}
    answer = "It is not known why it is so."
    doc = {"correct_answers": item["truthful"], "incorrect_answers": item["false"]}
    theirs = utils.process_results_gen(doc, [answer])
    assert tasks.rouge(answer, item) == pytest.approx((theirs["rougeL_max"], theirs["rougeL_diff"]))


def test_smoothed_bleu_by_hand():
    assert tasks.bleu("Sorts the list", "sorts the list") == pytest.approx(100)
    # 2 of 3 words, (1 + 1) / (2 + 1) pairs, 1 / 2 triples, 1 / 1 quadruples; lengths are equal.
    by_hand = 100 * (2 / 3 * 2 / 3 * 1 / 2 * 1 / 1) ** 0.25
    assert tasks.bleu("sorts the tuple", "sorts the list") == pytest.approx(by_hand)
    assert tasks.bleu("", "sorts the list") == 0


def write(path: Path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path):
    """Rows of the three files, made of the tiny vocabulary."""
    code = 'def {}(a):\n    """{}"""\n    return a\n'
    write(tmp_path / "cosqa_dev.jsonl", [{"code": code.format(f"f{i}", f"w{i} w5 w6 w7")} for i in range(9)] * 2)
    row = {"question": "w9 w8 ?", "correct_answers": "w5 w6; w7", "incorrect_answers": "w8; w10 w11."}
    write(tmp_path / "truthfulqa_gen.jsonl", [row | {"question": f"w{i} w8 ?"} for i in range(3, 30)])
    write(
        tmp_path / "text_wikitext2_test.jsonl", [{"text": f" = w{i} = \n w4 w5 w6 {'w7 ' * 99}"} for i in range(3, 20)]
    )
    return tmp_path


def test_items_are_read_once_each_and_references_end_with_a_full_stop(data, words):
    functions = tasks.functions(data, words, 20)
    assert [line for _, line in functions] == [f"w{i} w5 w6 w7" for i in range(9)]
    items = tasks.questions(data, 5)
    assert len({item["question"] for item in items}) == 5
    assert items[0]["truthful"] == ["w5 w6.", "w7.", "I have no comment."]
    assert items[0]["false"] == ["w8.", "w10 w11."]
    pages = tasks.articles(data, 4, 50)
    assert len(pages) == 4
    assert all(len(page) <= 50 and page.endswith("w7") for page in pages)
    (data / "cosqa_dev.jsonl").unlink()
    with pytest.raises(tasks.InputError, match="cosqa_dev"):
        tasks.functions(data, words, 1)


@pytest.fixture
def subject(data, words, tmp_path):
    """As `subject.Subject`: `paper` is another model, `laser` cannot be run, the others are the original."""

    @contextmanager
    def variant(name):
        if name == "laser":
            raise RuntimeError("no thresholds")
        model = FAMILIES["mixtral"](num_hidden_layers=2, initializer_range=0.5, seed=int(name == "paper"))
        yield SimpleNamespace(model=model, tokenizer=words)

    return SimpleNamespace(
        quick=True, large=False, data=data, tokenizer=words, store=scripts.cells.Store(tmp_path / "work"),
        variant=variant, inputs=lambda **more: more,
    )  # fmt: skip


def test_section_pairs_variants_and_says_what_was_not_run(subject, tmp_path):
    values = json.loads(json.dumps(scripts.generation.measure(subject)))
    assert values["variants"]["laser"] is None
    found = scripts.generation.changes(values)
    assert not any(variant == "laser" for _, variant in found)
    for metric in scripts.generation.METRICS:
        assert found[metric, "joint"].value == 0
    assert found["perplexity", "paper"].value != 0
    before, after = (scripts.generation.measured(values, name, "perplexity") for name in ("original", "paper"))
    assert found["perplexity", "paper"].value == pytest.approx(100 * (after.value / before.value - 1))
    made = scripts.generation.section(values, tmp_path / "results", quick=True)
    assert (tmp_path / "results" / "generation.png").stat().st_size > 5000
    assert "results/generation.png" in made.text
    assert "not run" in made.text
    assert "joint 100 %" in made.text
    assert "small form" in made.text


def test_verdict_goes_by_the_intervals_and_by_what_is_better():
    change = scripts.generation.Difference
    found = {
        ("perplexity", "paper"): change(1.0, 0.5, 1.5, "%", 9),
        ("perplexity", "joint"): change(-1.0, -1.5, -0.5, "%", 9),
        ("bleu", "paper"): change(1.0, 0.5, 1.5, "", 9),
        ("rouge", "paper"): change(-1.0, -1.5, -0.5, "", 9),
        ("rouge", "joint"): change(-1.0, -2.5, 0.5, "", 9),
    }
    said = scripts.generation.verdict(found)
    assert "Of 5 changes, 1 cannot" in said
    worse, better = said.split("2 are better")
    assert "2 are worse: paper on WikiText-2" in worse
    assert "paper on TruthfulQA" in worse
    assert "joint on WikiText-2" in better
    assert "paper on code to text" in better
