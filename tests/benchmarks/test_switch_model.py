import json

import numpy as np
import pytest
import torch
from switch_modules import scripts, small_artifact, small_config, small_model
from transformers import AutoModelForSeq2SeqLM

from equipoise import InputError
from equipoise.models.families import find_layers


def test_every_second_layer_is_sparse():
    model = small_model(4)
    assert [layer.layer_id for layer in find_layers(model)] == [1, 3, 5, 7]


def test_routers_start_undecided():
    model = small_model(8)
    probabilities = torch.softmax(model.encoder.block[1].layer[1].mlp.router.classifier(torch.randn(500, 16)), -1)
    assert probabilities.max(-1).values.mean() < 0.7


def test_artifact_rounds_matrices_and_nothing_else(tmp_path):
    weights = {name: p.detach() for name, p in small_model(4).named_parameters()}
    scripts.artifact.write(tmp_path / "a.safetensors", weights, {"said": 1})
    read, about = scripts.artifact.read(tmp_path / "a.safetensors")
    assert about == {"said": 1}
    assert read.keys() == weights.keys()
    packed = 0
    for name, weight in weights.items():
        if scripts.artifact.is_packed(name, weight):
            packed += 1
            step = weight.abs().amax(1, keepdim=True) / 127
            assert ((read[name] - weight).abs() <= step / 2 * 1.0001).all()
        else:
            assert torch.equal(read[name], weight)
    assert packed > 20
    assert not scripts.artifact.is_packed("encoder.block.1.layer.1.mlp.router.classifier.weight", torch.ones(4, 16))


def test_an_artifact_above_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(scripts.artifact, "LIMIT", 1000)
    with pytest.raises(InputError, match="smaller"):
        scripts.artifact.write(tmp_path / "a.safetensors", {"w": torch.ones(40, 40)}, {})
    assert not (tmp_path / "a.safetensors").exists()


def test_build_gives_a_plain_directory(tmp_path, monkeypatch, capsys):
    path = small_artifact(tmp_path / "a.safetensors")
    monkeypatch.setattr(scripts.build, "config", small_config)
    monkeypatch.setattr("sys.argv", ["build.py", "--artifact", str(path), "--out", str(tmp_path / "out")])
    scripts.build.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["out"] == str(tmp_path / "out")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    made, _ = scripts.build.original(path)
    ids = torch.tensor([[50, 60, 70, 1]])
    assert torch.equal(loaded(input_ids=ids, labels=ids).logits, made(input_ids=ids, labels=ids).logits)
    assert loaded.lm_head.weight.data_ptr() == loaded.shared.weight.data_ptr()


def test_build_refuses_what_does_not_fit(tmp_path, monkeypatch):
    path = small_artifact(tmp_path / "a.safetensors")
    monkeypatch.setattr(scripts.build, "config", lambda e: small_config(e, num_layers=2, num_sparse_encoder_layers=1))
    with pytest.raises(InputError, match="does not fit"):
        scripts.build.original(path)


@pytest.mark.parametrize("experts", scripts.model.EXPERTS)
def test_the_repository_has_trained_models(experts):
    path = scripts.artifact.path_of(experts)
    assert path.stat().st_size < 1.01 * scripts.artifact.LIMIT
    model, about = scripts.build.original(path)
    assert model.config.num_experts == experts
    tokenizer = scripts.text.load_tokenizer()
    ids = tokenizer("The city is the capital of the country and the largest city in the state.")["input_ids"]
    window = np.array(ids)
    inputs, targets = (torch.from_numpy(part)[None] for part in scripts.text.corrupt(window, np.random.default_rng(0)))
    with torch.no_grad():
        loss = float(model(input_ids=inputs, labels=targets).loss)
    assert loss < 0.9 * np.log(scripts.text.VOCABULARY), "trained: far better than chance on plain text"
    assert about["tokens"] > 5 * 10**5


def _tokens():
    random = np.random.default_rng(0)
    names = [f"{stream}.{part}" for stream in scripts.text.STREAMS for part in ("train", "held")]
    return {name: random.integers(100, 6000, 3000).astype(np.int32) for name in names}


def test_a_step_is_a_function_of_its_number():
    tokens = _tokens()
    first, again, other = (scripts.mixture.batches(tokens, step, 7) for step in (3, 3, 4))
    for (a, b), (c, d) in zip(first, again, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
    assert not torch.equal(first[0][0], other[0][0])
    assert [tuple(part.shape) for pair in first for part in pair] == [(10, 116), (10, 26), (12, 26), (12, 57)]


def test_rate_rises_and_falls():
    options = scripts.train.Options(8)
    rates = [scripts.train.rate(share, options) for share in np.linspace(0, 1, 101)]
    top = int(np.argmax(rates))
    assert rates[top] == pytest.approx(1.0, abs=0.01)
    assert (np.diff(rates[: top + 1]) > 0).all()
    assert (np.diff(rates[top:]) < 0).all()
    assert rates[-1] == pytest.approx(options.final_lr)


def test_a_checkpoint_goes_on_where_it_stopped(tmp_path):
    def step(model, optimizer, seed):
        torch.manual_seed(seed)
        ids = torch.randint(20, 6000, (2, 8))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    options = scripts.train.Options(4)
    whole = scripts.model.new_model(small_config(4, dropout_rate=0.0), 0)
    optimizer = scripts.train.optimizer_for(whole, options)
    step(whole, optimizer, 1)
    scripts.train.save(tmp_path, whole, optimizer, 5, 12.5)
    resumed = scripts.model.new_model(small_config(4, dropout_rate=0.0), 1)
    later = scripts.train.optimizer_for(resumed, options)
    assert scripts.train.restore(tmp_path, resumed, later) == (5, 12.5)
    later_state = later.state[resumed.shared.weight]["step"]
    assert float(later_state) == 5
    for state in optimizer.state.values():
        if state:
            state["step"].fill_(5.0)
    step(whole, optimizer, 2)
    step(resumed, later, 2)
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_training_has_no_dropout():
    model = small_model(4).train()
    scripts.train.no_dropout(model)
    ids = torch.tensor([[50, 60, 70, 1]])
    for module in model.modules():
        if type(module).__name__ == "SwitchTransformersTop1Router":
            module.jitter_noise = 0.0
    assert torch.equal(model(input_ids=ids, labels=ids).logits, model(input_ids=ids, labels=ids).logits)


def test_splitting_experts_keeps_the_model_and_parts_its_tokens():
    half, whole = small_model(4), scripts.model.new_model(small_config(8), 1).eval()
    weights = {name: p.detach() for name, p in half.named_parameters()}
    left = whole.load_state_dict(scripts.model.split_experts(weights, 3), strict=False)
    assert not left.unexpected_keys
    assert not [name for name in left.missing_keys if "expert" in name or "router" in name]
    ids = torch.randint(20, 6000, (4, 30))
    with torch.no_grad():
        a, b = (model(input_ids=ids, labels=ids, output_router_logits=True) for model in (half, whole))
    first, second = a.encoder_router_logits[0].argmax(-1), b.encoder_router_logits[0].argmax(-1)
    assert (second % 4 == first).float().mean() > 0.6, "most tokens stay with one of the two halves of their expert"
    assert (second >= 4).float().mean() > 0.2
    assert torch.nn.functional.cosine_similarity(a.logits.flatten(), b.logits.flatten(), 0) > 0.9


def test_a_split_needs_half_the_experts(tmp_path):
    path = small_artifact(tmp_path / "a.safetensors", 4)
    about = scripts.train.start_from(scripts.model.new_model(small_config(8), 0), path, 0)
    assert about == {"options": {"experts": 4}}
    with pytest.raises((InputError, RuntimeError)):
        scripts.train.start_from(scripts.model.new_model(small_config(16), 0), path, 0)
