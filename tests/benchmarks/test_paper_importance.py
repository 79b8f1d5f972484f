"""The truth about one expert, what might predict it, and the section of the paper benchmark about both."""

import contextlib
import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from script_modules import import_scripts

import equipoise as eq
from equipoise.evaluation.data import Batch
from equipoise.formats import get_format
from equipoise.types import Slot
from families.families_support import make_plan
from tiny import FAMILIES, VOCAB, save_tiny

scripts = import_scripts(
    "paper", "cells", "expert_changes", "expert_predictors", "importance_pictures", "importance_truth",
    "importance_words", "measured_layer", "product_change", "rank_agreement",
)  # fmt: skip
changes, predictors, ranks = scripts.expert_changes, scripts.expert_predictors, scripts.rank_agreement


@pytest.fixture
def model():
    return FAMILIES["mixtral"](num_hidden_layers=3)


def ids(windows=2, width=12, seed=0):
    return torch.randint(3, VOCAB, (windows, width), generator=torch.Generator().manual_seed(seed))


def logits(model, rows):
    with torch.inference_mode():
        return model(input_ids=rows, use_cache=False).logits[:, :-1].double()


def by_hand(before, after, rows):
    """KL divergence and rise of the loss of each window, by their definitions."""
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    rise = (p - q).gather(-1, rows[:, 1:, None])[..., 0]
    return (p.exp() * (p - q)).sum(-1).mean(1).numpy(), rise.mean(1).numpy()


@pytest.mark.parametrize("change", changes.CHANGES)
@pytest.mark.parametrize("layer", [0, 2])
def test_an_effect_is_the_divergence_and_the_rise_of_the_whole_model(model, change, layer):
    rows = ids()
    before = logits(model, rows)
    effect = changes.singles(changes.Bench(model, rows, layer), change)
    assert effect.divergence.shape == (8, 2)
    for expert in (0, 5):
        with changes.changed(model, {layer: expert}, change):
            divergence, rise = by_hand(before, logits(model, rows), rows)
        np.testing.assert_allclose(effect.divergence[expert], divergence, rtol=1e-3, atol=1e-9)
        np.testing.assert_allclose(effect.rise[expert], rise, rtol=1e-3, atol=1e-6)
    assert (effect.divergence >= 0).all()
    assert effect.divergence.max() > 0


@pytest.mark.parametrize("change", changes.CHANGES)
def test_a_change_touches_one_expert_and_is_undone(model, change):
    kept = copy.deepcopy(model.state_dict())
    before = logits(model, ids())
    with changes.changed(model, {1: 3}, change):
        for name, value in model.state_dict().items():
            same = value == kept[name]
            if change != "removed" and name.startswith("model.layers.1.mlp.experts."):
                assert not same[3].all()
                assert same[[e for e in range(8) if e != 3]].all()
            else:
                assert same.all()
        assert not torch.equal(logits(model, ids()), before)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model, ids()), before)


def test_a_removed_expert_gets_no_token_and_weights_still_sum_to_one(model):
    chosen = []
    experts = model.model.layers[1].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _m, inputs: chosen.append(inputs[1:]))
    with changes.changed(model, {1: 6}, "removed"):
        logits(model, ids())
    handle.remove()
    index, weights = chosen[0]
    assert not (index == 6).any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))


def test_rounding_is_the_products_int8_and_fifteen_levels():
    w = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    kept = w.clone()
    form = get_format("int8")
    assert torch.equal(changes.rounded(w, "int8"), form.decode(form.encode(w.clone(), -2), -2, w.dtype))
    coarse = changes.rounded(w, "4 bits")
    assert all(len(row.unique()) <= 15 for row in coarse)
    assert ((coarse - w).abs() <= w.abs().amax(-1, keepdim=True) / 14 * 1.001).all()
    assert torch.equal(w, kept)
    assert torch.equal(changes.rounded(torch.zeros(2, 4), "4 bits"), torch.zeros(2, 4))


def test_windows_are_taken_from_the_domains_in_turn():
    rows = torch.arange(6)[:, None].repeat(1, 5)
    batches = [
        Batch({"input_ids": rows[:4]}, ("a", "a", "a", "b")),
        Batch({"input_ids": rows[4:]}, ("b", "c")),
    ]
    taken, names = changes.spread(batches, 5, 3)
    assert names == ("a", "b", "c", "a", "b")
    assert taken.tolist() == [[i] * 3 for i in (0, 3, 5, 1, 4)]
    assert len(changes.spread(batches, 99, 9)[1]) == 6


def test_predictors_are_their_formulas(model):
    rows, layer = ids(3, 10), 1
    seen = predictors.observe(model, rows, [0, layer])[layer]
    found = predictors.predict(model.model.layers[layer].mlp.experts, seen)
    count, width = seen.x.shape
    assert count == 30

    def output(change, e):
        """The layer's routed output with expert e changed, by the model's own code."""
        got = []
        handle = model.model.layers[layer].mlp.register_forward_hook(lambda _m, _i, out: got.append(out[0]))
        # The layer's input does not depend on the layer.
        with changes.changed(model, {layer: e} if change else {}, change or "int8"):
            for row in rows:
                logits(model, row[None])
        handle.remove()
        return torch.cat(got)

    whole = output(None, 0)
    for change in changes.CHANGES:
        for e in (0, 4):
            delta = output(change, e) - whole
            squares = delta.square().sum(-1)
            slopes = seen.own.square().sum(-1) / width
            expected = {
                "own error": squares.sum() / whole.square().sum(),
                "error x layer": squares.sum() * slopes.mean() / 2 / count,
                "error x token": (squares * slopes).sum() / 2 / count,
                "fisher": (seen.own * delta).sum(-1).square().sum() / 2 / count,
                "slope": -(seen.text * delta).sum() / count,
            }
            for name, value in expected.items():
                assert found[change][name][e] == pytest.approx(float(value), rel=2e-3, abs=1e-12), (change, name)


def test_a_layer_is_measured_whole_and_shared_by_the_root_of_the_error(model):
    rows, layer = ids(3, 10), 1
    experts = model.model.layers[layer].mlp.experts
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    errors = {change: [float(e) for e in range(experts.num_experts)] for change in changes.CHANGES}
    found = scripts.measured_layer.measured(model, rows, layer, errors)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    bench = changes.Bench(model, rows)
    for change in ("int8", "4 bits"):
        with contextlib.ExitStack() as stack:
            for e in range(experts.num_experts):
                stack.enter_context(changes.changed(model, {layer: e}, change))
            whole = bench.effect().divergence.mean()
        assert whole > 0
        assert sum(found[change]) == pytest.approx(whole, rel=1e-3)
        assert found[change][4] == pytest.approx(2 * found[change][1])
    assert found["removed"] == found["4 bits"]


def test_slope_is_the_first_order_change_of_the_loss(model):
    rows, layer, e = ids(2, 10), 1, 2
    seen = predictors.observe(model, rows, [layer])[layer]
    slope = predictors.predict(model.model.layers[layer].mlp.experts, seen)["4 bits"]["slope"][e]
    # A thousandth of the way to the rounded output.
    experts = model.model.layers[layer].mlp.experts
    tokens, place = torch.where(seen.chosen == e)
    low = predictors.expert_output(experts, e, seen.x[tokens], "4 bits")
    delta = torch.zeros_like(seen.x)
    delta[tokens] = seen.weights[tokens, place, None] * (low - predictors.expert_output(experts, e, seen.x[tokens]))
    model.double()
    model.set_experts_implementation("eager")  # grouped products know no float64
    step, parts = 1e-3, list(delta.double().split(10))

    def loss():
        return float(-logits(model, rows).log_softmax(-1).gather(-1, rows[:, 1:, None]).sum()) / rows.numel()

    before = loss()
    nudge = torch.stack(parts) * step
    handle = experts.register_forward_hook(lambda _m, _i, out: out + nudge.reshape(out.shape))
    after = loss()
    handle.remove()
    assert (after - before) / step == pytest.approx(slope, rel=0.02, abs=1e-6)


def test_rank_agreement_is_scipys_and_its_interval_holds_it():
    rng = np.random.default_rng(0)
    a = rng.random((4, 8))
    b = a + 0.3 * rng.random((4, 8))
    b[0, :3] = b[0, 3]
    found = ranks.agreement(a, b, draws=200)
    assert found.pooled[0] == pytest.approx(spearmanr(a.ravel(), b.ravel()).statistic)
    assert found.within[0] == pytest.approx(np.mean([spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]))
    for value, low, high in (found.pooled, found.within):
        assert -1 <= low <= value <= high <= 1
    assert ranks.agreement(a, np.ones_like(a), draws=5).pooled == (0, 0, 0)
    assert ranks.agreement(a, a, draws=50).within[0] == pytest.approx(1)


def test_repeatability_tells_signal_from_noise():
    rng = np.random.default_rng(0)
    signal = rng.random((10, 8, 1)) + 0.01 * rng.random((10, 8, 6))
    assert ranks.repeatability(signal) > 0.95
    assert abs(ranks.repeatability(rng.random((10, 8, 6)))) < 0.5
    assert np.isnan(ranks.repeatability(rng.random((2, 8, 1))))


@pytest.fixture
def subject(tmp_path, model):
    """As `subject.Subject`, of a tiny model and random windows."""
    parts = {
        name: [Batch({"input_ids": ids(8, 16, seed), "attention_mask": torch.ones(8, 16).long()}, ("a", "b") * 4)]
        for seed, name in enumerate(("calibration", "rest"))
    }
    return SimpleNamespace(
        quick=True,
        dtype="auto",
        device="cpu",
        moe=save_tiny(model, tmp_path / "moe"),
        store=scripts.cells.Store(tmp_path / "work"),
        inputs=lambda **more: {"model": "tiny", **more},
        windows=lambda part="calibration": parts[part],
    )


def test_the_products_change_is_that_of_a_plan(model):
    """One expert in W8A8, all others as they are: what `apply` would make of the model."""
    rows = ids()
    before = logits(model, rows)
    effect = scripts.product_change.singles(changes.Bench(model, rows, 1))
    assert effect.divergence.shape == (8, 2)
    for expert in (0, 5):

        def slots(row: int, expert: int = expert) -> list[Slot]:
            return [Slot(e, "int8" if (row, e) == (1, expert) else "original") for e in range(8)]

        other = FAMILIES["mixtral"](num_hidden_layers=3)
        eq.apply(other, make_plan(other, slots))
        divergence, rise = by_hand(before, logits(other, rows), rows)
        np.testing.assert_allclose(effect.divergence[expert], divergence, rtol=1e-3, atol=1e-9)
        np.testing.assert_allclose(effect.rise[expert], rise, rtol=1e-3, atol=1e-6)


def test_section_is_written_from_measured_values_alone(subject, tmp_path):
    values = json.loads(json.dumps(scripts.importance_truth.measure(subject)))
    measured = subject.store.measured
    assert measured > 3
    assert values["layers"] == [1]
    again = json.loads(json.dumps(scripts.importance_truth.measure(subject)))
    assert again == values
    assert subject.store.measured == measured  # every part was kept
    made = scripts.importance_truth.section(values, tmp_path / "results", quick=True)
    pictures = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert pictures == ["importance-load.png", "importance-truth.png"]
    assert all(f"results/{name}" in made.text for name in pictures)
    for words in ("Spearman", "Table 5", "repeatability", "`fisher`", "small form"):
        assert words in made.text
    assert "nan" not in made.text.lower().replace("importance", "")


def test_verdict_follows_the_figures(subject):
    values = scripts.importance_truth.measure(subject)
    scores = scripts.importance_truth.scores(values)
    perfect = copy.deepcopy(values)
    error = np.array(values["importance"]["error"])[values["layers"]]
    for change in scripts.product_change.ALL:
        for name in ("divergence", "rise"):
            perfect["truth"][change][name] = np.stack([error, 2 * error], -1).tolist()
    words = scripts.importance_words
    said = words.verdict(perfect, words.agreements(perfect, scores), quick=False)
    assert said.count("met for all") == 2
    assert "small form" not in said
    for change in scripts.product_change.ALL:
        perfect["truth"][change]["divergence"] = np.stack([-error, -2 * error], -1).tolist()
    said = words.verdict(perfect, words.agreements(perfect, scores), quick=False)
    assert said.count("met for all") == 1
    assert "not met" in said
