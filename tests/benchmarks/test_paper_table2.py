import dataclasses

import numpy as np
import pytest
import torch
from paper_modules import template
from script_modules import import_scripts

import equipoise as eq
from tiny import VOCAB, build

paper = import_scripts("paper", "accuracy", "domains", "headline", "prompts", "subject", "table2")
TASKS, ACCURACY, VARIANTS = paper.prompts.TASKS, paper.prompts.ACCURACY, paper.subject.VARIANTS


def values(joint_wrong=0, bytes_joint=0.999):
    """Table 2 of a made-up run: 1,000 documents a task, `joint` gets `joint_wrong` of them wrong that were right."""
    right = [1.0] * 600 + [0.0] * 400
    after = [0.0] * joint_wrong + right[joint_wrong:]
    lis = {v: {task: {"each": [2.0, 4.0 - i], "task": 2.5 - 0.3 * i} for task in TASKS} for i, v in enumerate(VARIANTS)}
    acc = {v: {task: {task: after if v == "joint" else right[:300]} for task in ACCURACY} for v in VARIANTS}
    acc["original"] = {task: {task: right} for task in ACCURACY}
    sizes = dict.fromkeys(VARIANTS, 1.0) | {"joint": bytes_joint}
    return {"lis": lis, "acc": acc, "bytes": sizes}


def test_pairs_are_of_the_documents_both_answered():
    before, after = paper.accuracy.paired({"a": [1.0, 0, 1], "b": [0.0, 1]}, {"a": [1.0, 1], "b": [0.0, 0, 1]})
    np.testing.assert_array_equal(before.values, [1, 0, 0, 1])
    np.testing.assert_array_equal(after.values, [1, 1, 0, 0])


def test_changes_are_in_points_and_pooled_over_all_documents():
    found = paper.table2.changes(values(joint_wrong=10), "joint")
    assert found["piqa"]["value"] == pytest.approx(-1.0)
    assert found["pooled"]["value"] == pytest.approx(-1.0)
    assert found["pooled"]["n"] == 1000 * len(ACCURACY)
    assert found["pooled"]["low"] < -1 < found["pooled"]["high"]
    assert paper.table2.changes(values(), "paper")["pooled"]["n"] == 300 * len(ACCURACY)


@pytest.mark.parametrize(("wrong", "size", "verdicts"), [(0, 0.999, ["met", "met"]), (10, 1.001, ["missed", "missed"])])
def test_bars_follow_the_figures(wrong, size, verdicts):
    lines = paper.headline.bars({"table2": values(wrong, size)})
    assert [("met" if "**met**" in line else "missed") for line in lines] == verdicts


def test_a_cell_that_was_not_run_says_so(tmp_path):
    own = values()
    own["lis"]["paper"]["mmlu"] = own["acc"]["paper"]["mmlu"] = None
    text = paper.table2.section(own, tmp_path, False).text
    assert text.count("not run") == 5  # two cells of LIS, the means below them, one of accuracy
    assert (tmp_path / "table2.png").stat().st_size > 1000
    assert "not run" in paper.headline.section({"table2": own}).text


def test_the_rows_of_domains(tmp_path):
    row = {"raw": 2.0, "tokens": [100, 50]}
    for plan in paper.domains.PLANS:
        row |= {plan: 1.0, f"{plan}, oracle": 0.9, f"{plan}, replicas": 3, f"{plan}, bytes": 0.999}
    text = paper.domains.section({"code": row, "maths": row | {"own domain": 1.15}}, tmp_path, False).text
    assert "at the defaults held-out LIS is 1.07 on average and 1.15 at worst (bar 1.10: missed)" in text
    assert "with the budget filled LIS is 1.00 on average and 1.00 at worst (bar 1.10: met)" in text


def test_prompts_are_joined_and_batched():
    assert paper.prompts.joined([[1, 2], [3], [4, 5, 6]], 4, 0) == [[1, 2, 0, 3], [0, 4, 5, 6]]
    batches = list(paper.prompts.batched([[1, 2], [3], [4, 5, 6]], 2))
    assert [b["input_ids"].tolist() for b in batches] == [[[1, 2], [3, 0]], [[4, 5, 6]]]
    assert batches[0]["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_a_float32_copy_is_planned_as_the_checkpoint_and_applied_as_itself():
    stored = template()
    measured = dataclasses.replace(
        stored,
        meta={**stored.meta, "dtype": "float32"},
        expert_bytes={"original": 2 * stored.expert_bytes["original"], "int8": stored.expert_bytes["int8"]},
    )
    again = paper.subject.as_stored(measured)
    assert again.meta["dtype"] == "bfloat16"
    np.testing.assert_array_equal(again.expert_bytes["original"], stored.expert_bytes["original"])
    plan = eq.plan(dataclasses.replace(again, counts=np.arange(1, 25).reshape(3, 8)), budget=1.0)
    copy = paper.subject.as_computed(plan, again)
    assert copy.model.dtype == "float32"
    assert copy.layers == plan.layers
    kept = sum(slot.precision == "original" for layer in plan.layers for slot in layer.slots)
    assert copy.budget.plan_bytes == plan.budget.plan_bytes + 2000 * kept


def random_prompts(number=7, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, VOCAB, length).tolist() for length in draw.integers(3, 30, number)]


def balanced():
    """A tiny Mixtral with two replicas a layer."""
    model = build("mixtral")
    rows = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row))} for row in random_prompts()]
    eq.apply(model, eq.plan(eq.profile(model, rows), replicas=2, budget=2.0))
    return model


@pytest.mark.parametrize("make", [lambda: build("mixtral"), balanced])
def test_slot_counts_of_a_prompt_are_those_of_its_own_forward(make):
    model, rows = make(), random_prompts(seed=1)
    alone = paper.table2.slot_counts(model, rows, 1)
    for number, row in enumerate(rows):
        with eq.watch(model) as load, torch.no_grad():
            model(input_ids=torch.tensor([row]))
        for layer, counts in enumerate(load.slot_counts):
            np.testing.assert_array_equal(alone[layer][number], counts)
    for layer, counts in enumerate(paper.table2.slot_counts(model, rows, 3)):
        np.testing.assert_array_equal(alone[layer], counts)


def test_a_gpu_gets_more_rows_a_forward(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    store = paper.subject.Store(tmp_path / "work")
    rows = {d: paper.subject.Subject(tmp_path, tmp_path, store, True, device=d).rows for d in ("cpu", "cuda")}
    assert [rows["cpu"](n) for n in (1, 12, 100)] == [1, 12, 100]
    assert [rows["cuda"](n) for n in (1, 12, 100)] == [64, 64, 100]


def test_cells_do_not_depend_on_the_device(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    store = paper.subject.Store(tmp_path / "work")
    cpu, cuda = (paper.subject.Subject(tmp_path, tmp_path, store, True, "bfloat16", device=d) for d in ("cpu", "cuda"))
    assert cpu.inputs(a=1) == cuda.inputs(a=1)


def test_the_large_form_is_as_large_as_the_full_form():
    full, large = paper.subject.Sizes(), paper.subject.LARGE
    assert large.items > full.items
    assert large.subject_items > full.subject_items
    assert (large.prompts, large.windows, large.laser_windows) == (full.prompts, full.windows, full.laser_windows)


def test_the_quick_form_asks_some_subjects():
    every = paper.accuracy.members("mmlu", 57)
    assert len(every) == 57
    some = paper.accuracy.members("mmlu", 7)
    assert len(some) == 7
    assert set(some) < set(every)
    assert paper.accuracy.members("mmlu", 0) == ["mmlu"]
    assert paper.accuracy.members("piqa", 7) == ["piqa"]
