from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from page_reader import Page
from scipy import stats
from synthetic_run import DOMAINS, make_run

from equipoise.errors import InputError
from equipoise.files import load_plan, load_profile, save_plan, save_profile
from equipoise.metrics import lis
from equipoise.reporting import document, write_report
from equipoise.reporting.headline import change
from equipoise.reporting.run_directory import load_run
from equipoise.reporting.svg import ROLES
from equipoise.types import Profile

MIB = 2**20


def _numbers(cells: list[str]) -> np.ndarray:
    return np.array([float(cell) for cell in cells])


def test_the_page_asks_nothing_of_the_outside(small_page: Page) -> None:
    for reference in ("http://", "https://", "src=", "@import", "<link", "<iframe", "xmlns"):
        assert reference not in small_page.text
    for reference in small_page.references:
        assert reference.startswith(("#", "url(#", "data:image/png;base64,"))
    assert re.search(r"Content-Security-Policy\" content=\"default-src 'none'", small_page.text)


def test_the_page_is_well_formed(small_page: Page) -> None:
    assert small_page.problems == []
    assert small_page.text.startswith("<!DOCTYPE html>")
    assert len(set(small_page.ids)) == len(small_page.ids)
    targets = set(re.findall(r"#([\w.-]+)", " ".join(r for r in small_page.references if not r.startswith("data:"))))
    assert targets
    assert targets <= set(small_page.ids)


def test_pictures_have_words_and_follow_the_theme(small_page: Page) -> None:
    pictures = [values for tag, values in small_page.tags if tag == "svg"]
    assert len(pictures) == 7  # heat, LIS, gap, bytes, perplexity, two importances
    assert all(values["role"] == "img" and len(str(values["aria-label"])) > 30 for values in pictures)
    body = small_page.text[small_page.text.index("<body>") :]
    assert set(re.findall(r"var\(--([\w-]+)\)", small_page.text)) <= set(ROLES)
    # every colour of a picture is a role's: a fixed one would be lost on the other background
    assert re.findall(r"#[0-9a-fA-F]{6}\b", body) == []
    assert body.count('class="only-light"') == body.count('class="only-dark"') == 3
    assert "style>" not in body


def test_every_expert_stands_in_the_table_with_its_numbers(small_run: Path, small_page: Page) -> None:
    run = load_run(small_run)
    counts = np.array(run.metrics.heldout_counts)
    layers, experts = counts.shape
    column = lambda name: _numbers(small_page.column("t-experts", name)).reshape(layers, experts)  # noqa: E731
    assert small_page.column("t-experts", "layer") == [str(row) for row in range(layers) for _ in range(experts)]
    np.testing.assert_array_equal(column("expert"), np.tile(np.arange(experts), (layers, 1)))
    np.testing.assert_array_equal(column("selections before"), counts)
    np.testing.assert_allclose(column("before / mean"), counts / counts.mean(1, keepdims=True), atol=5e-5)
    np.testing.assert_array_equal(column("selections in calibration"), run.profile.counts)
    busiest = np.zeros_like(counts)
    for row, (layer, tokens) in enumerate(zip(run.plan.layers, run.metrics.heldout_slots, strict=True)):
        for slot, n in zip(layer.slots, tokens, strict=True):
            busiest[row, slot.expert] = max(busiest[row, slot.expert], n)
    np.testing.assert_array_equal(column("busiest slot's tokens after"), busiest)
    mean = np.array([sum(tokens) / experts for tokens in run.metrics.heldout_slots])[:, None]
    np.testing.assert_allclose(column("after / mean"), busiest / mean, atol=5e-5)
    np.testing.assert_array_equal(column("slots"), [layer.replicas() for layer in run.plan.layers])
    for name, values in run.profile.importance.items():
        np.testing.assert_allclose(column(f"{name} importance"), values, rtol=1e-5)
    held = small_page.column("t-experts", "precisions")
    for row, layer in enumerate(run.plan.layers):
        for e in range(experts):
            words = held[row * experts + e]
            assert ("original" in words) is not bool(layer.quantized()[e])
            n = sum(int(part.split()[0]) if part[0].isdigit() else 1 for part in words.split(" + "))
            assert n == layer.replicas()[e]


@pytest.mark.parametrize(("when", "load"), [("before", "selections before"), ("after", "busiest slot's tokens after")])
def test_ranks_and_gaps_in_the_table(small_run: Path, small_page: Page, when: str, load: str) -> None:
    metrics = load_run(small_run).metrics
    layers, experts = np.array(metrics.heldout_counts).shape
    totals = [sum(row) for row in (metrics.heldout_counts if when == "before" else metrics.heldout_slots)]
    counts = _numbers(small_page.column("t-experts", load)).reshape(layers, experts)
    ranks = _numbers(small_page.column("t-experts", f"rank {when}")).reshape(layers, experts)
    gaps = np.array(small_page.column("t-experts", f"gap to next {when} (%)")).reshape(layers, experts)
    for row in range(layers):
        order = np.argsort(ranks[row])
        assert sorted(ranks[row]) == list(range(1, experts + 1))
        loads = counts[row][order]
        assert (np.diff(loads) <= 0).all()
        assert gaps[row][order][-1] == ""
        np.testing.assert_allclose(
            _numbers(list(gaps[row][order][:-1])), 100 * -np.diff(loads) / totals[row], atol=5e-6
        )


def test_lis_table_holds_all_four_and_says_which(small_run: Path, small_page: Page) -> None:
    run = load_run(small_run)
    layers, summary = run.metrics.layers, run.metrics.summary
    column = lambda name: small_page.column("t-lis", name)  # noqa: E731
    assert column("layer") == [
        *(str(layer.layer) for layer in layers),
        "mean over layers",
        "mean over batches and layers",
    ]
    for name, values, mean, batch in (
        ("LIS before (held out)", [x.lis_before for x in layers], summary.lis_before, summary.lis_before_batch),
        ("LIS after (held out)", [x.lis_after for x in layers], summary.lis_after, summary.lis_after_batch),
        ("LIS before (in sample)", lis(run.profile.counts), summary.lis_before_in_sample, None),
        ("LIS after (in sample)", [x.lis_after_in_sample for x in layers], summary.lis_after_in_sample, None),
    ):
        cells = column(name)
        np.testing.assert_allclose(_numbers(cells[:-1]), [*values, mean], atol=5e-5)
        assert cells[-1] == ("" if batch is None else f"{batch:.4f}")


def test_plan_table(small_run: Path, small_page: Page) -> None:
    run = load_run(small_run)
    column = lambda name: small_page.column("t-plan", name)  # noqa: E731
    held = [[slot.precision for slot in layer.slots] for layer in run.plan.layers]
    assert column("module") == [*(layer.name for layer in run.plan.layers), "", ""]
    assert column("slots")[:-1] == [*(str(len(h)) for h in held), str(sum(map(len, held)))]
    for name in ("original", "int8", "float16"):
        n = [h.count(name) for h in held]
        assert column(f"{name} slots")[:-1] == [str(v) for v in (*n, sum(n))]
    assert column("replicas")[:-1] == [str(len(h) - 16) for h in held] + [str(run.plan.num_replicas)]
    assert column("experts quantized")[-2] == str(run.plan.num_quantized)
    sizes = [layer.bytes_after / MIB for layer in run.metrics.layers]
    np.testing.assert_allclose(_numbers(column("after (MiB)")[:-1]), [*sizes, sum(sizes)], atol=5e-5)
    shares = [100 * layer.tokens_quantized for layer in run.metrics.layers]
    np.testing.assert_allclose(_numbers(column("selections on quantized slots (%)")[:-2]), shares, atol=5e-5)
    tokens = [np.array(row) for row in run.metrics.heldout_slots]
    slot = [t.max() / t.mean() for t in tokens]
    cells = column("slot imbalance (held out)")
    np.testing.assert_allclose(_numbers([*cells[:-2], cells[-1]]), [*slot, np.mean(slot)], atol=5e-5)
    assert cells[-2] == ""
    assert len(column("rank imbalance (held out)")) == 6


def test_bytes_perplexity_and_correlation_tables(small_run: Path, small_page: Page) -> None:
    run = load_run(small_run)
    after = run.metrics.bytes_after
    total = run.metrics.summary.bytes_after
    assert small_page.column("t-bytes", "precision") == ["original", "int8", "all", "allowed by the budget"]
    assert small_page.column("t-bytes", "after (bytes)") == [
        str(v) for v in (after["original"], after["int8"], total, run.plan.budget.limit_bytes)
    ]
    assert small_page.column("t-bytes", "before (bytes)")[1] == "0"
    assert _numbers(small_page.column("t-bytes", "share after (%)")[:2]).sum() == pytest.approx(100, abs=1e-3)
    assert small_page.column("t-ppl", "domain") == [*DOMAINS, "all text"]
    for key, name in (("before", "perplexity before"), ("after", "perplexity after"), ("delta_pct", "change (%)")):
        values = [getattr(entry, key) for entry in run.metrics.perplexity]
        np.testing.assert_allclose(_numbers(small_page.column("t-ppl", name)), [*values[1:], values[0]], atol=5e-5)
    lows = [entry.ci95[0] for entry in run.metrics.perplexity if entry.ci95]
    np.testing.assert_allclose(_numbers(small_page.column("t-ppl", "95 % from (%)")), [*lows[1:], lows[0]], atol=5e-5)
    assert small_page.column("t-ppl", "scored tokens")[-1] == "25510"
    for name, values in run.profile.importance.items():
        rho = [stats.spearmanr(n, v).statistic for n, v in zip(run.profile.counts, values, strict=True)]
        cells = _numbers(small_page.column("t-rho", f"ρ of load and {name}"))
        np.testing.assert_allclose(cells, [*rho, np.median(rho)], atol=5e-5)


def test_headline_and_how_it_was_made(small_run: Path, small_page: Page) -> None:
    run = load_run(small_run)
    s = run.metrics.summary
    prose = small_page.prose.replace("\N{NO-BREAK SPACE}", " ")
    assert f"carries {s.lis_after:.2f} times an even share" in prose
    assert f"carried {s.lis_before:.2f} times (LIS, mean over 4 MoE layers)" in prose
    assert "perplexity went from 12.500 to 12.504 (+0.03 %, 95 % interval −0.05 to +0.11 %)" in prose
    assert f"{100 * s.tokens_quantized:.1f} % of token selections ran on a quantized slot" in prose
    assert "100.0 % of the experts' original memory" in prose
    made = {(row[0], row[1]): row[2] for row in small_page.tables["t-made"][1:]}
    assert made["made with", "torch"] == "2.13.0"
    assert made["option", "max_quantized"] == "0.5"
    assert made["option", "data"] == '["calibration.jsonl.gz"]'
    assert made["plan", "seed"] == "0"
    assert made["profile", "sha256"] == run.plan.profile_sha256
    assert float(made["result", "lis_after"]) == s.lis_after
    assert made["model", "model_type"] == "mixtral"


@pytest.mark.parametrize(
    ("delta", "ci95", "words"),
    [
        (0.032, (-0.05, 0.114), "+0.03 %, 95 % interval −0.05 to +0.11 %"),
        (-0.0004, (-0.0127, 0.0118), "0.000 %, 95 % interval −0.013 to +0.012 %"),
        (58.9, None, "+58.90 %, no interval: too few windows of text"),
    ],
)
def test_a_change_is_told_with_the_digits_that_show_it(
    delta: float, ci95: tuple[float, float] | None, words: str
) -> None:
    assert change(delta, ci95).replace("\N{NO-BREAK SPACE}", " ") == words


def test_the_same_run_gives_the_same_bytes(small_run: Path, small_page: Page, tmp_path: Path) -> None:
    again = write_report(small_run, tmp_path / "deep" / "again.html")
    assert again.read_text(encoding="utf-8") == small_page.text


def test_a_deep_model_stays_within_bounds(tmp_path: Path) -> None:
    make_run(tmp_path, layers=16, experts=48, skew=1.4)
    page = Page.read(write_report(tmp_path))
    assert page.problems == []
    assert len(page.tables["t-experts"]) == 1 + 16 * 48
    assert "12 of 16 layers are drawn" in page.prose
    assert len(page.text) < 500_000


def test_hostile_names_are_text(tmp_path: Path) -> None:
    names = ["<b>&'\"$x_0$.1.\x07", "</svg><script>alert(1)</script>.1"]
    make_run(tmp_path, layers=2, experts=4, names=names, numbers=[1, 1])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    metrics["perplexity"][1]["domain"] = "</svg><script>$5 & more</script> 中文 \x01" + "long " * 20
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    page = Page.read(write_report(tmp_path))
    assert page.problems == []
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert page.column("t-plan", "module")[1] == names[1]


@pytest.mark.parametrize(
    ("layers", "experts", "importance"), [(1, 2, ("error",)), (2, 3, ()), (1, 1, ("wanda",)), (3, 41, ("frequency",))]
)
def test_any_shape_and_any_importance(tmp_path: Path, layers: int, experts: int, importance: tuple[str, ...]) -> None:
    make_run(tmp_path, layers=layers, experts=experts, importance=importance)
    page = Page.read(write_report(tmp_path))
    assert page.problems == []
    assert [tag for tag, _ in page.tags].count("svg") == 4 + (experts > 1) + len(importance)
    assert ("carries no importance" in page.prose) is (not importance)


def test_a_layer_without_load_is_drawn_as_balanced(tmp_path: Path) -> None:
    make_run(tmp_path, layers=2, experts=4, idle=(1,))
    page = Page.read(write_report(tmp_path))
    assert page.column("t-lis", "LIS before (held out)")[1] == "1.0000"
    assert page.column("t-rho", "ρ of load and error")[1] == "constant"


def _other_profile(path: Path) -> None:
    profile = load_profile(path / "profile.npz")
    counts = profile.counts + 1
    save_profile(Profile(counts, profile.layer_ids, profile.meta, profile.layer_names), path / "profile.npz")


def _other_metrics(path: Path) -> None:
    make_run(path / "other", layers=2, experts=8, seed=1)
    shutil.copy(path / "other" / "metrics.json", path / "metrics.json")


def _other_plan(path: Path) -> None:
    make_run(path / "other", layers=4, experts=16, seed=1)
    save_plan(load_plan(path / "other" / "plan.json"), path / "plan.json")


def _other_in_sample(path: Path) -> None:
    document = json.loads((path / "metrics.json").read_text())
    document["summary"]["lis_before_in_sample"] = 1.5
    (path / "metrics.json").write_text(json.dumps(document))


def _renamed_layer(path: Path) -> None:
    text = (path / "metrics.json").read_text().replace("model.layers.2.mlp.experts", "model.layers.2.ffn")
    (path / "metrics.json").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: (path / "plan.json").unlink(), "plan.json is missing"),
        (lambda path: (path / "profile.npz").write_bytes(b"PK"), "profile"),
        (lambda path: (path / "metrics.json").write_text("{}"), "metrics.json: format is None"),
        (lambda path: (path / "plan.json").write_text("[]"), "plan.json"),
        (_other_profile, "another profile"),
        (_other_plan, "another profile"),
        (_other_metrics, "metrics.json has 2 layers of 8 experts, profile.npz has 4 of 16"),
        (_other_in_sample, "lis_before_in_sample 1.5"),
        (_renamed_layer, "model.layers.2.ffn"),
    ],
)
def test_wrong_run_directories_are_refused(tmp_path: Path, spoil: Callable[[Path], None], says: str) -> None:
    make_run(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError) as caught:
        write_report(tmp_path)
    assert says in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_destinations_that_cannot_be_a_page(small_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run directory"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is a directory"):
        write_report(small_run, tmp_path)
    before = (small_run / "plan.json").read_bytes()
    with pytest.raises(InputError, match="file of the run itself"):
        write_report(small_run, small_run / "." / "plan.json")
    assert (small_run / "plan.json").read_bytes() == before


def test_a_failure_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, layers=1, experts=4)
    (tmp_path / "report.html").write_text("old")

    def fail(*_: object) -> str:
        raise RuntimeError("no picture today")

    monkeypatch.setattr(document, "heat_map", fail)
    with pytest.raises(RuntimeError, match="no picture today"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"
    assert not list(tmp_path.glob(".*partial"))
