"""`equipoise eval` as a user runs it: tables, the JSON line, and one clear line for wrong input."""

import json
import subprocess
import sys

import pytest
from tiny_eval_models import byte_tokenizer, tiny_mixtral

from equipoise.cli.main import run
from equipoise.evaluation.evaluate import compare_evaluations, evaluate_models
from equipoise.files.text import read_texts
from equipoise.options import EvalOptions


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    rows = [{"text": f"{word} and {word} again, it was said", "domain": word[0]} for word in ("ash", "birch", "beech")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "other"
    tiny_mixtral(seed=1).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def _json(capsys):
    out = capsys.readouterr().out.rstrip("\n").splitlines()
    return json.loads(out[-1]), "\n".join(out[:-1])


def test_text_and_the_file(mixtral_dir, text, tmp_path, capsys):
    out = tmp_path / "results.json"
    assert run(["eval", str(mixtral_dir), "--data", str(text), "--seq-len", "16", "--out", str(out)]) == 0
    result, table = _json(capsys)
    assert result["ppl"] > 1
    assert set(result["ppl_by_domain"]) == {"a", "b"}
    assert result["ppl_tokens"] == 15 * result["ppl_windows"]
    assert f"{result['ppl']:.3f}" in table
    assert json.loads(out.read_text()) == {key: value for key, value in result.items() if key != "out"}
    assert run(["eval", str(mixtral_dir), "--data", str(text), "--out", str(out)]) == 2
    assert "--force" in capsys.readouterr().err


def test_limit_spreads_over_the_windows(mixtral_dir, text):
    records = read_texts([text])
    (everything,) = evaluate_models([str(mixtral_dir)], EvalOptions(seq_len=8), records=records)
    (some,) = evaluate_models([str(mixtral_dir)], EvalOptions(seq_len=8, limit=2), records=records)
    assert some.text.nll.tolist() == pytest.approx([everything.text.nll[0], everything.text.nll[-1]], rel=1e-5)


def test_a_model_against_itself_and_another(mixtral_dir, other_dir, text, task_data, capsys):
    pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    common = ["--data", str(text), "--seq-len", "16", "--tasks", "piqa,lambada_openai", "--task-data", str(task_data)]
    assert run(["eval", str(mixtral_dir), "--against", str(mixtral_dir), *common]) == 0
    result, _ = _json(capsys)
    difference = result["difference"]
    assert (difference["ppl"]["percent"], difference["ppl"]["ci95"]) == (0.0, [0.0, 0.0])
    assert difference["tasks"]["piqa"]["acc"]["points"] == 0.0
    assert difference["tasks"]["piqa"]["acc"]["ci95"][1] > 0  # three documents prove no equality

    assert run(["eval", str(other_dir), "--against", str(mixtral_dir), *common]) == 0
    result, table = _json(capsys)
    ratio = result["ppl"] / result["against"]["ppl"]
    assert result["difference"]["ppl"]["percent"] == pytest.approx(100 * (ratio - 1))
    low, high = result["difference"]["ppl"]["ci95"]
    assert low < result["difference"]["ppl"]["percent"] < high
    own, others = result["tasks"]["piqa"]["acc"], result["against"]["tasks"]["piqa"]["acc"]
    assert result["difference"]["tasks"]["piqa"]["acc"]["points"] == pytest.approx(100 * (own - others))
    perplexity = [side["tasks"]["lambada_openai"]["perplexity"] for side in (result, result["against"])]
    change = result["difference"]["tasks"]["lambada_openai"]["perplexity"]["percent"]
    assert change == pytest.approx(100 * (perplexity[0] / perplexity[1] - 1))
    assert result["difference"]["pooled"]["n"] == 5
    assert result["tasks"]["piqa"]["n"] == 3
    for word in ("piqa acc_norm", "lambada_openai perplexity", "95 % interval", "points", "all documents acc"):
        assert word in table


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{model}"], "nothing to evaluate on"),
        (["{model}", "--tasks", ","], "names no task"),
        (["{model}", "--tasks", "piqa"], "--task-data"),
        (["{model}", "--tasks", "piqua", "--task-data", "{tasks}"], "no such task"),
        (["{model}", "--data", "gone.jsonl"], "no such data file"),
        (["gone", "--data", "{text}"], "no such model"),
        (["{model}", "--against", "gone", "--data", "{text}"], "no such model"),
        (["{model}", "--data", "{text}", "--seq-len", "1"], "seq-len"),
        (["{model}", "--data", "{text}", "--batch-size", "0"], "batch-size"),
        (["{model}", "--data", "{text}", "--limit", "-1"], "limit"),
        (["{model}", "--data", "{text}", "--dtype", "int3"], "int3"),
    ],
)
def test_wrong_input_is_one_line(arguments, words, mixtral_dir, task_data, text, capsys, monkeypatch, tmp_path):
    if "piqua" in arguments:
        pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    monkeypatch.delenv("EQUIPOISE_TASK_DATA", raising=False)
    filled = [a.format(model=mixtral_dir, tasks=task_data, text=text) for a in arguments]
    out = tmp_path / "out.json"
    assert run(["eval", *filled, "--out", str(out)]) == 2
    caught = capsys.readouterr()
    assert caught.out == ""
    assert words in caught.err
    assert len(caught.err.strip().splitlines()) == 1
    assert not out.exists()


def test_models_of_other_words_are_not_compared_on_text(mixtral_dir, text, tmp_path, capsys, monkeypatch):
    path = tmp_path / "no_bos"
    tiny_mixtral().save_pretrained(path)
    byte_tokenizer(bos=False).save_pretrained(path)
    monkeypatch.setattr("equipoise.evaluation.evaluate.evaluate_text", None)  # refused before any model runs
    assert run(["eval", str(mixtral_dir), "--against", str(path), "--data", str(text)]) == 2
    assert "different tokens" in capsys.readouterr().err


def test_other_items_are_not_paired(mixtral_dir, text):
    records = read_texts([text])
    runs = [evaluate_models([str(mixtral_dir)], EvalOptions(seq_len=n), records=records)[0] for n in (8, 16)]
    with pytest.raises(ValueError, match="same windows"):
        compare_evaluations(*runs)


def test_help_needs_no_torch():
    code = (
        "import sys; from equipoise.cli.main import run; code = run(['eval', '--help']);"
        "sys.exit(code or 10 * ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "equipoise eval demo --tasks piqa,arc_easy" in done.stdout
