import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_moe_modules import scripts, tiny_llama, trained_like
from torch.nn import functional


def tokens(rows=3, width=20):
    return torch.randint(0, 97, (rows, width), generator=torch.Generator().manual_seed(1))


def test_dense_path_is_the_llama_of_transformers():
    dense = tiny_llama()
    model = scripts.model.Upcycled(dense, 4, 3, 2)
    ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(model.dense(ids), dense.model(ids).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_experts_start_as_the_dense_ffn():
    model = scripts.model.Upcycled(tiny_llama(), 4, 3, 2)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens())[0], model.dense(tokens()), rtol=1e-4, atol=1e-5)


def test_dense_path_hands_out_what_enters_each_ffn():
    dense = tiny_llama()
    model = scripts.model.Upcycled(dense, 4, 3, 2)
    wanted, seen = [], []
    for layer in dense.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _module, inputs: wanted.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        dense.model(tokens())
    model.dense(tokens(), seen)
    assert len(seen) == 3
    for own, theirs in zip(seen, wanted, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_built_mixtral_computes_what_was_trained(top_k):
    model, dense = trained_like(top_k=top_k)
    built = scripts.build.mixtral(dense, dict(model.trained()), top_k)
    seen = []
    for layer in built.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[1]))
    ids = tokens()
    with torch.no_grad():
        hidden, _, counts = model(ids)
        torch.testing.assert_close(built.model(ids).last_hidden_state, hidden, rtol=1e-3, atol=1e-4)
    for own, chosen in zip(counts, seen, strict=True):
        per_window = [torch.bincount(row.flatten(), minlength=4) for row in chosen.view(3, -1)]
        assert torch.equal(own, torch.stack(per_window))
    assert int(counts.sum()) == 3 * ids.numel() * top_k


def test_built_mixtral_is_a_plain_checkpoint(tmp_path):
    from transformers import AutoModelForCausalLM

    model, dense = trained_like()
    built = scripts.build.mixtral(dense, dict(model.trained()), 2)
    built.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, built(tokens()).logits)


def without_neurons(model, share=0.4):
    """The model with random neurons missing, and its weights by the artifact's names."""
    random = torch.Generator().manual_seed(2)
    for layer in model.layers:
        layer.keep.copy_(torch.rand(layer.keep.shape, generator=random) > share)
    return dict(model.trained()) | {f"{n}.keep": layer.keep for n, layer in enumerate(model.layers)}


def test_missing_neurons_are_zero_in_the_built_model():
    model, dense = trained_like()
    whole = model(tokens())[0]
    weights = without_neurons(model)
    built = scripts.build.mixtral(dense, weights, 2)
    with torch.no_grad():
        hidden = model(tokens())[0]
        torch.testing.assert_close(built.model(tokens()).last_hidden_state, hidden, rtol=1e-3, atol=1e-4)
    assert float((hidden - whole).abs().max().detach()) > 1e-2
    for n, layer in enumerate(built.model.layers):
        width = dense.config.intermediate_size
        missing = ~model.layers[n].keep
        gate_up = layer.mlp.experts.gate_up_proj.view(4, 2, width, -1)
        assert not gate_up.transpose(1, 2)[missing].any()
        assert not layer.mlp.experts.down_proj.transpose(1, 2)[missing].any()


def test_missing_neurons_survive_the_artifact(tmp_path):
    model, dense = trained_like()
    scripts.artifact.write(tmp_path / "a.safetensors", without_neurons(model), {})
    read, _ = scripts.artifact.read(tmp_path / "a.safetensors")
    other = scripts.model.Upcycled(dense, 4, 3, 2)
    scripts.model.fill(other, read)
    for own, again in zip(model.layers, other.layers, strict=True):
        assert torch.equal(own.keep, again.keep)


def test_an_artifact_of_whole_experts_holds_no_masks(tmp_path):
    model, _ = trained_like()
    weights = dict(model.trained()) | {f"{n}.keep": layer.keep for n, layer in enumerate(model.layers)}
    scripts.artifact.write(tmp_path / "a.safetensors", weights, {})
    assert not [name for name in scripts.artifact.read(tmp_path / "a.safetensors")[0] if name.endswith("keep")]


def test_balancing_loss_is_one_when_even_and_counts_the_rest():
    model, _ = trained_like(experts=4, top_k=2)
    with torch.no_grad():
        for layer in model.layers:
            layer.router.zero_()
            layer.router[0, 0] = 1e-6  # ties are broken, probabilities stay even
    assert abs(float(model(tokens())[1]) - 1) < 1e-4


def test_gradients_reach_routers_and_factors_only():
    model, dense = trained_like()
    hidden, balance, _ = model(tokens())
    (hidden.pow(2).mean() + balance).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in model.trained())
    assert all(p.grad is None for p in dense.parameters())


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 9), taught=st.integers(0, 9), chunk=st.integers(1, 10), seed=st.integers(0, 99))
def test_head_loss_and_its_gradient(n, taught, chunk, seed):
    taught = min(taught, n)
    random = torch.Generator().manual_seed(seed)
    head = torch.randn(13, 6, generator=random)
    hidden = torch.randn(n, 6, generator=random, requires_grad=True)
    teacher = torch.randn(taught, 6, generator=random)
    target = torch.randint(0, 13, (n,), generator=random)
    alpha, beta = torch.rand(n, generator=random), torch.rand(taught, generator=random)
    total, nll, kl = scripts.losses.HeadLoss(head, chunk=chunk)(hidden, target, alpha, teacher, beta)
    (2 * total).backward()
    found, hidden.grad = hidden.grad, None
    logp = (hidden @ head.T).log_softmax(-1)
    wanted_nll = functional.nll_loss(logp, target, reduction="none")
    q = (teacher @ head.T).softmax(-1)
    wanted_kl = (q * (q.log() - logp[:taught])).sum(-1)
    wanted = (alpha * wanted_nll).sum() + (beta * wanted_kl).sum()
    (2 * wanted).backward()
    torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, hidden.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(nll, wanted_nll, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kl[:taught], wanted_kl, rtol=1e-3, atol=1e-5)
    assert not kl[taught:].any()
