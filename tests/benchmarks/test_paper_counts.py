"""benchmarks/paper: sections made from recorded counts alone (samples, gaps, streams, ablation)."""

import json

import numpy as np
import pytest
from paper_modules import prompt_counts, scripts, tasks, template

import equipoise as eq
from equipoise.cli import console


def plain(values):
    """As a cell keeps them."""
    return json.loads(json.dumps(console.plain(values)))


@pytest.mark.parametrize("number", [1, 5, 16, 17, 100])
def test_merged_windows_hold_every_prompt(number):
    counts = prompt_counts(number)
    merged = scripts.counted.merged(counts)
    assert len(merged) == min(number, scripts.counted.WINDOWS)
    np.testing.assert_array_equal(merged.sum(0), counts.sum(0))


def test_plans_from_counts_keep_the_model_and_no_importance():
    counts = prompt_counts(20)
    profile = scripts.counted.counted_profile(counts, template())
    assert not profile.importance
    made = scripts.counted.counted_plans(profile)
    for i, layer in enumerate(made["paper"].layers):
        assert layer.replicas()[counts.sum(0)[i].argmax()] == 2
    assert made["joint"].budget.plan_bytes <= made["joint"].budget.original_bytes


def test_in_sample_scores_are_ordered():
    counts = prompt_counts(200, skew=2.0)
    found = scripts.samples.scores(counts, counts, template())
    assert found["oracle"] <= found["joint"] + 1e-12
    assert found["paper"] < found["raw"]
    assert found["found"] == 1


def test_subsets_are_held_out_and_nested():
    counts = prompt_counts(100)
    runs = scripts.samples.subsets(counts, template(), seed=0)
    assert [run["prompts"] for run in runs.values()] == [1, 2, 5, 10, 50]
    assert len({run["raw"] for run in runs.values()}) == 1  # the same half is scored
    order = np.random.default_rng(0).permutation(100)
    assert runs["0.5"]["raw"] == pytest.approx(eq.lis(counts[order[50:]].sum(0)).mean())


@pytest.fixture(scope="module")
def samples_values():
    routing = tasks()
    fractions = {
        task: [scripts.samples.subsets(counts, template(), seed) for seed in range(2)]
        for task, counts in routing.items()
    }
    return plain({"fractions": fractions, "across": scripts.samples.across(routing, template())})


def test_samples_section(samples_values, tmp_path):
    across = samples_values["across"]
    assert np.array(across["joint"]).shape == (9, 8)
    own = np.diag(np.array(across["joint"])[:8])
    others = np.array(across["joint"])[:8][~np.eye(8, dtype=bool)]
    assert own.mean() < others.mean()  # each task has its own busy experts here
    made = scripts.samples.section(samples_values, tmp_path, quick=True)
    assert "instead of" in made.text
    assert (tmp_path / "samples.png").exists()


def test_across_words_where_tasks_are_alike(samples_values):
    alike = {**samples_values, "across": {**samples_values["across"], "joint": np.ones((9, 8)).tolist()}}
    assert "does as well as on its own task" in scripts.samples.verdict(alike)


def test_sorted_loads_by_hand():
    counts = np.array([[6, 2, 0, 0]])
    plan = eq.plan(
        scripts.counted.counted_profile(counts[None], template(1, 4)), preset="paper", importance="frequency"
    )
    np.testing.assert_allclose(scripts.gaps.loads(counts, None)[0], [3, 1, 0, 0])
    np.testing.assert_allclose(scripts.gaps.loads(counts, plan)[0], [1.5, 1.5, 1, 0, 0])


def test_gaps_section(tmp_path):
    routing = tasks()
    profile = scripts.counted.counted_profile(np.concatenate(list(routing.values())), template())
    values = plain(scripts.gaps.measure_counts(routing, scripts.counted.counted_plans(profile)))
    raw = np.mean([scripts.gaps.loads(c.sum(0), None)[0] for c in routing.values()], axis=0)
    assert values["raw"]["gap"][0] == pytest.approx(raw[0] - raw[-1])
    assert len(values["paper"]["sorted"]) == 9
    made = scripts.gaps.section(values, tmp_path, quick=True)
    assert f"{np.mean(values['joint']['gap']):.2f} with joint" in made.text
    assert (tmp_path / "gaps.png").exists()


def test_task_stream_keeps_order_and_load():
    routing = tasks(24)
    parts = scripts.streams.task_stream(routing, windows=4, parts=8)
    assert parts.shape == (32, 6, 3, 8)
    for i, counts in enumerate(routing.values()):
        np.testing.assert_array_equal(parts[4 * i : 4 * i + 4].sum((0, 1)), counts.sum(0))
        np.testing.assert_array_equal(parts[4 * i].sum(0), counts[:6].sum(0))


def test_streams_section(tmp_path):
    values = plain(scripts.streams.measure_counts(tasks(60), keep=0.5))
    assert values["documents"] == 30
    assert values["hit"] > values["hit_all"]
    assert [run["spare"] for run in values["streams"]["tasks"]] == [1, 2]
    for runs in values["streams"].values():
        for run in runs:
            assert run["lis"]["oracle"] <= min(run["lis"].values()) + 1e-12
    made = scripts.streams.section(values, tmp_path, quick=True)
    assert "30 of 60 MMLU prompts" in made.text
    assert (tmp_path / "streams.png").exists()


def ablation_values():
    routing = tasks()
    counts = np.concatenate(list(routing.values()))
    from dataclasses import replace

    profile = replace(scripts.counted.counted_profile(counts, template()), importance=template().importance)
    rest = {task: counts[4:] for task, counts in routing.items()}
    raw = {task: float(eq.lis(counts.sum(0)).mean()) for task, counts in rest.items()}
    rows = {"original": {"lis": raw, "bytes": 1.0, "replicas": 0.0, "quantized": 0.0, "perplexity": 10.0}}
    for name, made in scripts.ablation.plans(profile).items():
        found = scripts.ablation.balance(made, rest)
        rows[name] = {**found, "perplexity": 10.01, "change": [0.1, -0.1, 0.3]}
    return plain({"rows": rows, "windows": 3, "tokens": 700, "draws": scripts.ablation.DRAWS})


def test_ablation_strategies_differ_as_they_must(tmp_path):
    values = ablation_values()
    rows = values["rows"]
    assert list(rows) == ["original", *scripts.ablation.STRATEGIES, "joint"]
    for name in ("quantize-only", "quantize-all"):
        assert rows[name]["lis"] == pytest.approx(rows["original"]["lis"])
        assert rows[name]["replicas"] == 0
    assert rows["rq"]["lis"] == pytest.approx(rows["quantize-heavy"]["lis"])
    assert rows["rq"]["replicas"] == rows["random"]["replicas"] == 1
    assert rows["quantize-all"]["quantized"] == 8
    assert rows["quantize-all"]["bytes"] == pytest.approx(1010 / 2000)
    assert rows["rq"]["bytes"] == pytest.approx((7 * 2000 + 2 * 1010) / 16000)
    made = scripts.ablation.section(values, tmp_path, quick=True)
    assert "for no strategy is it worse beyond chance" in made.text
    assert "Lower precision alone moves no load" in made.text
    assert (tmp_path / "ablation.png").exists()


def test_ablation_names_what_is_worse():
    values = ablation_values()
    values["rows"]["quantize-all"]["change"] = [0.5, 0.2, 0.8]
    assert "worse beyond chance for quantize all" in scripts.ablation.verdict(values)
