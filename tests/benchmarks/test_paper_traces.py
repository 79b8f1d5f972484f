"""benchmarks/paper/traces.py on made-up traces."""

import json

import numpy as np
import pytest
from paper_modules import scripts

from equipoise.cli import console
from equipoise.errors import InputError

traces = scripts.traces


def write(folder, name, meta, **arrays):
    counts = arrays.pop("counts")
    np.savez(folder / f"{name}.npz", meta=json.dumps(meta), counts=counts, layer_ids=np.arange(len(counts)), **arrays)


@pytest.fixture
def folder(tmp_path):
    draw = np.random.default_rng(0)
    popularity = np.array([0.4, 0.3, 0.1, 0.05, 0.05, 0.04, 0.03, 0.03])
    ids = np.stack(
        [[draw.choice(8, 2, replace=False, p=popularity) for _ in range(2)] for _ in range(3000)]
    )  # tokens, layers, k
    counts = np.stack([np.bincount(ids[:, i].ravel(), minlength=8) for i in range(2)])
    meta = {"model": "Mixtral-8x7B", "top_k": 2, "measured": True, "phase": "prefill"}
    write(tmp_path, "ids", meta, counts=counts, topk_ids=ids.astype(np.int16))
    series = np.stack([draw.multinomial(4000, popularity, 2) for _ in range(6)])
    write(tmp_path, "series", {**meta, "model": "other", "phase": "prefill batches, altered input"},
          counts=series.sum(0), series=series)  # fmt: skip
    write(tmp_path, "total", {**meta, "model": "DeepSeek-MoE-16B-base"}, counts=counts)
    write(tmp_path, "example", {**meta, "measured": False}, counts=counts)
    return tmp_path


def test_section_of_every_measured_trace(folder):
    values = json.loads(json.dumps(console.plain(traces.measure(folder))))
    rows = values["traces"]
    assert list(rows) == ["ids", "series", "total"]
    assert rows["ids"]["windows"] == 2
    assert [rows[n]["how"] for n in rows] == ["tokens, first 10 %", "steps, 1 of 6", "total, in sample"]
    assert rows["ids"]["stream"]["window"] == "128 tokens"
    assert rows["ids"]["stream"]["steps"] == 22
    assert rows["series"]["stream"]["steps"] == 5
    assert rows["total"]["stream"] is None
    for row in rows.values():
        assert row["oracle"] <= row["quarter"] + 1e-12
        assert row["paper"] < row["raw"]
    made = traces.section(values, folder / "pictures", quick=False)
    held = made.text.split("Altered input")
    assert "| series |" in held[1]
    assert "| ids |" in held[0]
    assert "| ids | 2 x 8, 2 | tokens, first 10 % |" in made.text
    assert (folder / "pictures" / "traces.png").exists()


def test_no_published_figure_is_made_up():
    assert traces.published("Mixtral-8x7B-v0.1") == "LASER: not available here"
    assert traces.published("DeepSeek-V2-Lite (ESFT-vanilla-lite)") == "R&Q: not available here"
    assert traces.published("gpt-oss-20b") == ""


def test_a_folder_without_traces_is_refused(tmp_path):
    with pytest.raises(InputError, match="--traces DIR"):
        traces.measure(tmp_path)
