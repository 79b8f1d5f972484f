"""The task files say what the harness's own say, and read the published rows into the same prompts."""

import functools
from pathlib import Path

import pytest
import task_rows

from equipoise.errors import InputError
from equipoise.evaluation import harness, rows
from equipoise.evaluation.harness import TASKS, find_task_data, load_tasks

lm_eval = pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
datasets = pytest.importorskip("datasets")

HARNESS = Path(lm_eval.__file__).parent / "tasks"
# our task -> the harness's file, and items as the harness downloads them
OWN = {
    "piqa": ("piqa/piqa.yaml", task_rows.PIQA),
    "hellaswag": ("hellaswag/hellaswag.yaml", task_rows.HELLASWAG_RAW),
    "winogrande": ("winogrande/default.yaml", task_rows.WINOGRANDE),
    "truthfulqa_mc1": ("truthfulqa/truthfulqa_mc1.yaml", task_rows.TRUTHFULQA_RAW),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2.yaml", task_rows.TRUTHFULQA_RAW),
    "arc_easy": ("arc/arc_easy.yaml", task_rows.ARC_RAW),
    "arc_challenge": ("arc/arc_challenge.yaml", task_rows.ARC_RAW[::-1]),
    "gsm8k": ("gsm8k/gsm8k.yaml", task_rows.GSM8K),
    "lambada_openai": ("lambada/lambada_openai.yaml", task_rows.LAMBADA),
    "wikitext": ("wikitext/wikitext.yaml", task_rows.WIKITEXT_RAW),
    "mmlu_virology": (
        "mmlu/default/mmlu_virology.yaml",
        [row for row in task_rows.MMLU if row["subject"] == "virology"],
    ),
}


def _load(path):
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(path)


def _comparable(value):
    """A function by its code: the harness may load the same file under two module names."""
    return (value.__name__, value.__code__.co_code) if callable(value) else value


def _theirs(name, items):
    """The harness's own task, offline: its file, with rows from here instead of its download."""
    from lm_eval.api.task import ConfigurableTask

    config = {
        k: v for k, v in _load(HARNESS / OWN[name][0]).items() if k not in ("tag", "dataset_path", "dataset_name")
    }
    splits = {config.get(key) for key in ("training_split", "validation_split", "test_split", "fewshot_split")} - {None}
    data = {split: datasets.Dataset.from_list(items) for split in splits}
    return ConfigurableTask(config={**config, "custom_dataset": lambda **_: data})


@pytest.mark.parametrize("name", OWN)
def test_definitions_are_the_harness_own(name):
    mine = _load(next(TASKS.rglob(f"{name}.yaml")))
    theirs = _load(HARNESS / OWN[name][0])
    keys = ("output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "process_results", "filter_list",
            "repeats", "generation_kwargs", "num_fewshot", "fewshot_config", "description", "test_split")  # fmt: skip
    for key in keys:
        assert _comparable(mine.get(key)) == _comparable(theirs.get(key)), key
    assert mine["metadata"]["version"] == theirs["metadata"]["version"]
    metrics = {m["metric"]: m for m in mine["metric_list"]}
    assert set(metrics) == {m["metric"] for m in theirs["metric_list"]}
    for metric in theirs["metric_list"]:
        for key, value in metric.items():
            assert metrics[metric["metric"]][key] == value


def test_every_mmlu_subject_is_there_and_as_the_harness_has_it():
    theirs = sorted(HARNESS.glob("mmlu/default/*mmlu*.yaml"))
    assert len(theirs) == 57 + 5
    for path in theirs:
        mine, own = _load(TASKS / "mmlu" / path.name), _load(path)
        for key in ("task", "task_alias", "tag", "description", "group", "group_alias", "aggregate_metric_list"):
            assert mine.get(key) == own.get(key), (path.name, key)
        if "dataset_name" in own:
            assert mine["dataset_kwargs"] == {"subject": own["dataset_name"]}


@pytest.mark.parametrize("name", OWN)
def test_rows_become_the_prompts_of_the_harness(name, task_data):
    mine = load_tasks([name], task_data)["tasks"][name]
    theirs = _theirs(name, OWN[name][1])
    documents = list(mine.eval_docs), list(theirs.eval_docs)
    assert len(documents[0]) == len(documents[1]) == len(OWN[name][1])
    for ours, own in zip(*documents, strict=True):
        assert mine.doc_to_text(ours) == theirs.doc_to_text(own)
        assert mine.doc_to_target(ours) == theirs.doc_to_target(own)
        if mine.config.doc_to_choice is not None:
            assert mine.doc_to_choice(ours) == theirs.doc_to_choice(own)
        ask = functools.partial(mine.fewshot_context, num_fewshot=0)
        assert ask(ours) == theirs.fewshot_context(own, num_fewshot=0)


def test_fewshot_prompts_use_the_training_rows(task_data):
    task = load_tasks(["mmlu_virology"], task_data, fewshot=2)["tasks"]["mmlu_virology"]
    prompt = task.fewshot_context(task.eval_docs[0], num_fewshot=2)
    assert prompt.startswith(
        "The following are multiple choice questions (with answers) about virology.\n\nWhich is 0?"
    )
    assert prompt.count("Answer: ") == 2
    arc = load_tasks(["arc_easy"], task_data, fewshot=3)["tasks"]["arc_easy"]
    prompt = arc.fewshot_context(arc.eval_docs[0], num_fewshot=3)
    assert sorted(line for line in prompt.splitlines() if "Is " in line) == [
        f"Question: Is {i} easy?" for i in range(3)
    ]
    assert load_tasks(["truthfulqa_mc1"], task_data, fewshot=4)["tasks"]["truthfulqa_mc1"].config.num_fewshot == 0


def test_names_with_stars_and_tags(task_data):
    assert sorted(load_tasks(["arc_*"], task_data)["tasks"]) == ["arc_challenge", "arc_easy"]
    assert sorted(load_tasks(["truthfulqa"], task_data)["tasks"]) == ["truthfulqa_mc1", "truthfulqa_mc2"]


def test_wrong_names_files_and_rows_are_refused(task_data, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"no such task: 'piqua'; there are .*piqa"):
        load_tasks(["piqua"], task_data)
    with pytest.raises(InputError, match="Duplicate"):
        load_tasks(["arc_easy", "ai2_arc", "mmlu", "mmlu_virology"], _mmlu_for_all(tmp_path / "all"))
    with pytest.raises(InputError, match="piqa: 2 examples in the prompt are wanted, but its data has 0"):
        load_tasks(["piqa"], task_data, fewshot=2)
    with pytest.raises(InputError, match=r"neither piqa_val.jsonl nor piqa_val.jsonl.gz"):
        load_tasks(["piqa"], tmp_path)
    (tmp_path / "piqa_val.jsonl").write_text('{"goal": "a", "sol1": "b"}\n')
    with pytest.raises(InputError, match="line 1 has no field 'sol2'"):
        load_tasks(["piqa"], tmp_path)
    with pytest.raises(InputError, match="no rows for 'anatomy'"):
        rows.mmlu(str(task_data), "anatomy")
    monkeypatch.delenv("EQUIPOISE_TASK_DATA", raising=False)
    with pytest.raises(InputError, match="--task-data"):
        find_task_data(None)
    with pytest.raises(InputError, match="not a directory"):
        find_task_data(tmp_path / "gone")
    monkeypatch.setenv("EQUIPOISE_TASK_DATA", str(task_data))
    assert find_task_data(None) == task_data


def _mmlu_for_all(directory):
    """MMLU with a row of each subject, and ARC."""
    task_rows.write_task_data(directory)
    subjects = [_load(path)["dataset_kwargs"]["subject"] for path in (TASKS / "mmlu").glob("mmlu_*.yaml")]
    import json

    text = "".join(json.dumps({**task_rows.MMLU[0], "subject": s}) + "\n" for s in subjects)
    for name in ("mmlu_test", "mmlu_dev"):
        for old in directory.glob(f"{name}*"):
            old.unlink()
        (directory / f"{name}.jsonl").write_text(text)
    return directory


def test_templates_are_compiled_once_and_rendered_for_each_document(tmp_path):
    from lm_eval import utils

    for _ in range(2):
        harness._manager(tmp_path)
    assert utils.env.from_string("{{question}}?") is utils.env.from_string("{{question}}?")
    assert [utils.apply_template("{{question}}?", {"question": q}) for q in ("who", "why")] == ["who?", "why?"]
