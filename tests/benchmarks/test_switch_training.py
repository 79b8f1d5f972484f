"""Training on an accelerator, as far as a processor can show it: batches, experts at once, clock, resuming."""

import itertools
import json
import threading
import time
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from switch_modules import scripts, small_config, small_model

from equipoise import InputError

feed, mixture, pairs, task, text, train = (
    getattr(scripts, name) for name in ("feed", "mixture", "pairs", "task", "text", "train")
)
TOKENIZER = text.load_tokenizer()


def small_tokens():
    random = np.random.default_rng(0)
    parts = ("train", "held")
    tokens = {f"{s}.{part}": random.integers(100, 6000, 3000).astype(np.uint16) for s in text.STREAMS for part in parts}
    for part in parts:
        for name, width in (
            (f"pairs.{part}.question", pairs.WORDS),
            (f"pairs.{part}.answer", pairs.SENTENCE),
            (f"sentences.{part}", pairs.SENTENCE),
        ):
            rows = random.integers(100, 6000, (40, width)).astype(np.uint16)
            rows[np.arange(width) >= random.integers(3, width + 1, 40)[:, None]] = text.PAD
            tokens[name] = rows
    return tokens


def scaled(tokens, step, scale, seed=7):
    return mixture.scaled_batches(tokens, step, seed, scale, feed.chances(tokens))


@settings(deadline=None, max_examples=40)
@given(size=st.integers(200, 900), length=st.integers(5, 60), first=st.integers(0, 400), count=st.integers(1, 40))
def test_windows_are_those_of_training(size, length, first, count):
    tokens = np.arange(size).astype(np.uint16)
    found = feed.windows(tokens, length, range(first, first + count), (3, 1))
    wanted = [text.training_window(tokens, length, n, (3, 1)) for n in range(first, first + count)]
    assert np.array_equal(found, wanted)


def test_a_stream_shorter_than_a_window_is_refused():
    with pytest.raises(InputError, match="too short"):
        feed.windows(np.arange(10), 20, range(2), (3, 1))


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 6), length=st.integers(12, 128), seed=st.integers(0, 10_000))
def test_spans_of_many_windows_lose_nothing(rows, length, seed):
    random = np.random.default_rng(seed)
    windows = random.integers(100, 6000, (rows, length))
    inputs, targets = feed.corrupted(windows, random)
    assert (inputs.shape[1], targets.shape[1]) == text.corrupted_lengths(length)
    spans = text.noise_lengths(length)[1]
    for window, given_row, hidden in zip(windows, inputs, targets, strict=True):
        assert given_row[-1] == hidden[-1] == text.END
        order = [int(token) for token in hidden if token < 100][:-1]
        assert order == [text.FIRST_SENTINEL + n for n in range(spans)]
        pieces = np.split(hidden[:-1], np.flatnonzero(hidden[:-1] < 100))[1:]
        assert all(len(piece) > 1 for piece in pieces), "no span is empty"
        restored = []
        for token in given_row[:-1]:
            restored += pieces[token - text.FIRST_SENTINEL][1:].tolist() if token < 100 else [int(token)]
        assert restored == window.tolist()


def test_every_way_to_part_a_number_is_equally_likely():
    parts = feed._partitions(6000, 5, 3, np.random.default_rng(0))
    assert (parts.sum(1) == 5).all()
    ways, counts = np.unique(parts, axis=0, return_counts=True)
    assert len(ways) == 6
    assert counts == pytest.approx(np.full(6, 1000), abs=150)


def test_words_of_a_sentence_keep_their_order_and_rare_ones_stay():
    sentences = np.full((3000, 30), text.PAD)
    sentences[:, :16] = np.arange(100, 116)
    chance = np.ones(text.VOCABULARY)
    chance[108:] = 9.0
    kept = feed.kept_words(sentences, chance, np.random.default_rng(0))
    lengths = (kept != text.PAD).sum(1)
    assert kept.shape == (3000, task.INPUT - 2)
    assert (lengths.min(), lengths.max()) == (2, 10)
    for row, length in zip(kept, lengths, strict=True):
        assert (np.diff(row[:length]) > 0).all()
        assert (row[length:] == text.PAD).all()
    assert ((kept >= 108).sum() / lengths.sum()) > 0.7


def test_pairs_have_the_form_of_the_task():
    asked, answers = ["how old is it", "where " * 40], ["it is old", "there " * 90]
    given_rows = pairs.padded(asked, TOKENIZER, pairs.WORDS).astype(np.int64)
    batch = feed.in_form(given_rows, pairs.padded(answers, TOKENIZER, pairs.SENTENCE).astype(np.int64))
    wanted = task.inputs_of(asked, TOKENIZER)
    assert torch.equal(batch["input_ids"], wanted["input_ids"])
    assert torch.equal(batch["attention_mask"], wanted["attention_mask"])
    assert torch.equal(batch["labels"], task.targets_of(answers, TOKENIZER))


def _write(directory, stem, rows):
    (directory / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_nothing_of_the_test_file_is_trained_on(tmp_path):
    seen, other = "The moon is made of rock and dust .", "The sun is a star of great heat and light ."
    _write(tmp_path, "wikiqa_test", [{"question": "what is the moon", "sentence": seen, "label": 1}])
    _write(tmp_path, "arc_easy_test", [])
    _write(tmp_path, "arc_challenge_test", [])
    arc = [{"question": f"Which of the {n} ?", "choices": ["a", "b"], "answer": 1} for n in range(9)]
    _write(tmp_path, "arc_train", [*arc, {"question": "What is the Moon?", "choices": ["a dusty rock"], "answer": 0}])
    wikipedia = [("What is the sun?", other), ("What orbits the earth?", "the moon is made of rock, and dust")]
    _write(tmp_path, "wikipedia_qa_pairs", [{"question": q, "answer": a} for q, a in wikipedia])
    pubmed = [("Is it so?", "It is so in mice.", split) for split in (True, False)]
    keys = ("QUESTION", "LONG_ANSWER", "in_test_split")
    _write(tmp_path, "pubmedqa_labeled", [dict(zip(keys, row, strict=True)) for row in pubmed])
    texts = [f"{seen} {other} Unfinished {n}" for n in range(10)]
    for stem in ("text_wikipedia_articles", "text_wikitext2_train_prefix"):
        _write(tmp_path, stem, [{"text": said} for said in texts])
    _write(tmp_path, "text_wikipedia_cal", [])

    found = [pair for part in (False, True) for pair in pairs.questions(tmp_path, part)]
    assert sorted(found) == sorted(
        [*((f"Which of the {n}", "b") for n in range(9)), ("What is the sun", other), ("Is it so", "It is so in mice.")]
    )
    assert list(pairs.questions(tmp_path, True)), "some are held out"
    assert set(pairs.sentences(tmp_path, False)) == {other}
    assert list(pairs.sentences(tmp_path, True)) == [other, other]
    arrays = pairs.prepared(tmp_path, TOKENIZER)
    assert arrays["sentences.train"].shape == (18, pairs.SENTENCE)
    assert len(arrays["pairs.train.question"]) + len(arrays["pairs.held.question"]) == 11


def test_a_scaled_step_is_a_function_of_its_number():
    tokens = small_tokens()
    first, again, other = (scaled(tokens, step, 3) for step in (3, 3, 4))
    shapes = [[tuple(batch[name].shape) for name in ("input_ids", "labels")] for batch in first]
    assert shapes == [[(30, 116), (30, 26)], [(36, 26), (36, 57)], [(36, task.INPUT), (36, task.TARGET)]]
    for a, b, c in zip(first, again, other, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert not torch.equal(a["input_ids"], c["input_ids"])


def test_a_scaled_step_has_the_windows_of_many_steps():
    tokens = small_tokens()
    whole = scaled(tokens, 2, 3)[1]
    parts = [scaled(tokens, step, 1)[1] for step in (6, 7, 8)]
    rows = sorted(row.tolist() for part in parts for row in part["labels"])
    assert sorted(row.tolist() for row in whole["labels"]) == rows


@pytest.mark.parametrize("capacity", [64, 2])
def test_experts_at_once_are_experts_in_turn(capacity):
    loop, whole = (
        scripts.model.new_model(small_config(4, dropout_rate=0.0, expert_capacity=capacity), 0) for _ in range(2)
    )
    assert scripts.dense.all_at_once(whole) == 4
    ids = torch.randint(20, 6000, (5, 12))
    losses = []
    for model in (loop.train(), whole.train()):
        for module in model.modules():
            if type(module).__name__ == "SwitchTransformersTop1Router":
                module.jitter_noise = 0.0
        out = model(input_ids=ids, labels=ids, output_router_logits=True)
        out.loss.backward()
        losses.append(out.loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for (name, a), b in zip(loop.named_parameters(), whole.parameters(), strict=True):
        wanted = torch.zeros_like(a) if a.grad is None else a.grad
        torch.testing.assert_close(b.grad, wanted, atol=1e-6, rtol=1e-4, msg=name)


def test_steps_are_made_ahead_in_their_order():
    made = []

    def make(step):
        made.append(step)
        return step

    source = feed.ahead(make, 5)
    assert list(itertools.islice(source, 10)) == list(range(5, 15))
    time.sleep(0.3)
    assert len(made) <= 10 + feed.DEPTH + 1
    source.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("ahead")]


def test_an_error_of_the_thread_is_raised_where_it_is_read():
    def make(step):
        if step == 2:
            raise InputError("no text")
        return step

    source = feed.ahead(make, 0)
    assert [next(source), next(source)] == [0, 1]
    with pytest.raises(InputError, match="no text"):
        next(source)


def run(tmp_path, monkeypatch, *arguments):
    monkeypatch.setattr(train, "config", small_config)
    monkeypatch.setattr("sys.argv", ["train.py", "--work", str(tmp_path), *arguments])
    train.main()


@pytest.fixture
def work(tmp_path):
    np.savez_compressed(tmp_path / "tokens.npz", **small_tokens())
    return tmp_path


def test_a_scaled_run_ends_in_an_artifact_and_goes_on(work, monkeypatch, capsys):
    ticks = itertools.count()  # half a second at each look, whatever the machine
    clocks = types.SimpleNamespace(process_time=lambda: next(ticks) / 2, monotonic=time.monotonic)
    monkeypatch.setattr(train, "time", clocks)
    run(work, monkeypatch, "--scale", "1", "--minutes", "0.02")
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert first["tokens"] == first["steps"] * (train.STEP_TOKENS + feed.PAIR_TOKENS) > 0
    assert set(first["held_out"]) == {*mixture.SPANS, "spans", "continuation", "pairs"}
    _, about = scripts.artifact.read(work / "switch8.safetensors")
    assert about == first
    run(work, monkeypatch, "--scale", "1", "--minutes", "0.02")
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again == first, "the budget is used up"
    run(work, monkeypatch, "--scale", "1", "--minutes", "0.05")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] > first["steps"]


def test_the_clock_is_the_processors_or_the_walls(work, monkeypatch):
    """A process that waits uses its budget on a CUDA device and not on the processor."""
    tokens = small_tokens()
    waited = [0]

    def waits(tokens, first, options):
        while True:
            waited[0] += 1
            yield scaled(tokens, 0, 1)

    # A step takes a second, a quarter of it on the processor.
    clocks = types.SimpleNamespace(monotonic=lambda: waited[0], process_time=lambda: waited[0] / 4)
    monkeypatch.setattr(train, "time", clocks)
    monkeypatch.setattr(train, "steps", waits)
    taken = {}
    for device in ("cuda", "cpu"):
        (work / device).mkdir()
        options = train.Options(4, 0.05, device=device, scale=1)
        taken[device] = train.train(small_model(4).train(), tokens, work / device, options)
    assert taken == {"cuda": 3, "cpu": 12}


def test_a_loss_that_is_not_finite_is_never_saved(work, monkeypatch):
    model = small_model(4).train()
    with torch.no_grad():
        model.shared.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        train.train(model, small_tokens(), work, train.Options(4, 0.01))
    assert not (work / "checkpoint.safetensors").exists()


def test_tokens_are_asked_for(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--data"):
        run(tmp_path, monkeypatch)
    old = {name: ids for name, ids in small_tokens().items() if "sentences" not in name}
    np.savez(tmp_path / "tokens.npz", **old)
    with pytest.raises(InputError, match="earlier version"):
        run(tmp_path, monkeypatch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_refused(work, monkeypatch):
    with pytest.raises(InputError, match="no CUDA device"):
        run(work, monkeypatch, "--device", "cuda")


@pytest.mark.parametrize(("option", "value"), [("scale", -1), ("rate", float("nan")), ("minutes", -2.0)])
def test_options_are_validated(option, value):
    with pytest.raises(InputError, match=option):
        train.Options(8, **{option: value})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_run_on_a_cuda_device(work, monkeypatch, capsys):
    run(work, monkeypatch, "--device", "cuda", "--scale", "1", "--minutes", "0.1")
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    run(work, monkeypatch, "--device", "cuda", "--scale", "1", "--minutes", "0.15")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] > first["steps"] > 0
