"""`equipoise stream MODEL`: text through a model, questions, and the adversarial stream."""

import gzip
import json

import numpy as np
import pytest

from core_models import write_text
from equipoise.cli.main import run
from equipoise.errors import InputError
from equipoise.files.text import TextRecord
from equipoise.models import find_layers
from equipoise.models.loading import load_model
from equipoise.pipeline.stream_text import adversarial_text, text_stream
from equipoise.runtime import slot_bytes
from equipoise.streaming import read_documents
from equipoise.streaming.options import TextOptions
from tiny import EXPERTS, build, save_tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(build("mixtral"), tmp_path_factory.mktemp("stream") / "model")


@pytest.fixture(scope="module")
def loaded(directory):
    return load_model(directory)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", documents=30, words=40)


def questions(path, number=40):
    draw = np.random.default_rng(1)
    rows = []
    for i in range(number):
        words = [f"w{n}" for n in draw.integers(3, 120, 24)]
        rows.append({"subject": f"s{i // 10}", "question": " ".join(words[:16]), "choices": words[16:20], "answer": 1})
    lines = "\n".join(map(json.dumps, rows)).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def test_a_text_through_a_model(directory, data, tmp_path, capsys):
    out = tmp_path / "results.json"
    arguments = ["stream", str(directory), "--data", str(data), "--window", "100", "--seq-len", "32", "--out", str(out)]
    assert run(arguments) == 0
    printed = capsys.readouterr()
    line = json.loads(printed.out.splitlines()[-1])
    assert line["steps"] == line["tokens"] // 100 - 1 >= 8
    assert set(line["lis"]) == {"raw", "static", "long", "short", "adaptive", "oracle"}
    assert line["lis"]["oracle"] <= min(line["lis"].values()) + 1e-9
    assert line["lis"]["raw"] == max(line["lis"].values())
    written = json.loads(out.read_text())
    assert written["replicas"] == EXPERTS // 4
    assert written["starts"] == [[0, "text.txt"]]
    assert out.with_suffix(".png").is_file()
    layer = find_layers(build("mixtral"))[0]
    assert line["moved_bytes"]["short"] == line["moves"]["short"] * slot_bytes(layer.layout, "original") > 0


def test_it_is_the_stream_that_the_model_routes(loaded, data):
    options = TextOptions(seq_len=32)
    stream = text_stream(loaded.model, loaded.tokenizer, read_documents([data]), 64, options)
    windows = np.stack(list(stream.windows))
    assert len(windows) == stream.count
    assert (windows.sum((1, 3)) == 64 * 2).all()  # top-2
    shorter = text_stream(
        loaded.model, loaded.tokenizer, read_documents([data]), 64, TextOptions(seq_len=32, max_tokens=320)
    )
    assert shorter.count == 5
    assert np.array_equal(np.stack(list(shorter.windows)), windows[:5])


def test_files_and_domains_are_where_names_begin(loaded, data, tmp_path):
    text = data.read_text().splitlines()
    lines = [{"text": line, "domain": f"d{i % 2}"} for i, line in enumerate(text)]
    second = tmp_path / "second.jsonl"
    second.write_text("\n".join(map(json.dumps, lines)))
    options = TextOptions(seq_len=16)
    files = text_stream(loaded.model, loaded.tokenizer, read_documents([data, second]), 50, options)
    assert [name for _, name in files.names] == ["text.txt", "second.jsonl"]
    domains = text_stream(loaded.model, loaded.tokenizer, read_documents([second], by_domain=True), 50, options)
    assert [name for _, name in domains.names] == ["d0", "d1"]
    assert 0 < domains.names[1][0] < domains.count


def test_questions_are_read_as_prompts(tmp_path):
    path = questions(tmp_path / "q.jsonl.gz")
    records = read_documents([path], by_domain=True)
    assert len(records) == 40
    assert records[0].domain == "s0"
    first = records[0].text.splitlines()
    assert [line[:3] for line in first[1:5]] == ["A. ", "B. ", "C. ", "D. "]
    assert first[5] == "Answer:"
    assert {record.domain for record in read_documents([path])} == {"q.jsonl.gz"}
    for row, word in (
        ({"question": "a", "choices": "b"}, "choices"),
        ({"question": " ", "choices": ["a", "b"]}, "question"),
        ([], "question"),
    ):
        bad = tmp_path / "bad.jsonl"
        bad.write_text(json.dumps({"question": "a", "choices": ["a", "b"]}) + "\n" + json.dumps(row))
        with pytest.raises(InputError, match=f"line 2.*{word}"):
            read_documents([bad])


def test_the_adversarial_stream(directory, loaded, tmp_path, capsys):
    path = questions(tmp_path / "q.jsonl")
    arguments = [
        "stream",
        str(directory),
        "--data",
        str(path),
        "--adversarial",
        "--keep",
        "0.5",
        "--policy",
        "long,short",
    ]
    assert run(arguments) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["steps"] == 9
    assert (line["documents"], line["kept"]) == (40, 20)
    assert line["hit_share"] > line["hit_share_all"] > 0
    records = read_documents([path], by_domain=True)
    stream, chosen, counts = adversarial_text(loaded.model, loaded.tokenizer, records, TextOptions(keep=0.5))
    assert np.array_equal(stream.windows.sum(0), counts[chosen.kept].sum(0))
    # Batches by length must not reorder the documents: one alone gives its own counts.
    alone = adversarial_text(loaded.model, loaded.tokenizer, [*records[7:17]], TextOptions(keep=1.0, batch_size=1))[2]
    assert np.array_equal(alone, counts[7:17])
    some = adversarial_text(loaded.model, loaded.tokenizer, records, TextOptions(sequences=10, keep=1.0))[2]
    assert np.array_equal(some, counts[2::4])


def test_what_says_nothing_about_the_source_is_refused(directory, data, tmp_path, capsys):
    model, text = str(directory), str(data)
    short = tmp_path / "short.txt"
    short.write_text("w3 w4 w5 w6")
    cases = [
        ([], "give what to replay"),
        ([model, "--trace", "t.npz"], "not both"),
        ([model], "no text"),
        (["--trace", "t.npz", "--data", text], "data runs a MODEL"),
        (["--trace", "t.npz", "--seq-len", "9"], "seq-len runs a MODEL"),
        ([model, "--data", text, "--keep", "0.5"], "keep is for --adversarial"),
        ([model, "--data", text, "--adversarial", "--window", "9"], "window is not for --adversarial"),
        ([model, "--data", text, "--expert-bytes", "9"], "leave it out"),
        ([model, "--data", text, "--window", "0"], "at least 1"),
        ([model, "--data", text, "--seq-len", "1"], "seq-len"),
        ([model, "--data", text, "--policies", "best"], "'best' is not one of"),
        ([model, "--data", text, "--replicas", "-1"], "must not be negative"),
        ([model, "--data", str(short)], "at least 3"),
        ([model, "--data", str(short), "--adversarial"], "1 sequences cannot"),
        ([model, "--data", "absent.txt"], "no such data file"),
        (["absent", "--data", text], "no such model"),
    ]
    for arguments, word in cases:
        assert run(["stream", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert word in error
        assert error.count("\n") == 1


def test_records_of_one_token_are_passed_over(loaded):
    records = [TextRecord(f"w{i} w{i + 1} w{i + 2}", "x") for i in range(3, 15)] + [TextRecord("w3", "x")]
    _, _, counts = adversarial_text(loaded.model, loaded.tokenizer, records, TextOptions(keep=1.0))
    assert len(counts) == 12
