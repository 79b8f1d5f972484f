import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_moe_modules import scripts
from torch.nn import functional

usage, kept = scripts.neurons.usage, scripts.neurons.kept


def test_usage_is_what_a_loop_over_tokens_adds_up():
    random = torch.Generator().manual_seed(0)
    x, router = torch.randn(11, 6, generator=random), torch.randn(4, 6, generator=random)
    base_in, base_out = torch.randn(2 * 9, 6, generator=random), torch.randn(6, 9, generator=random)
    wanted = torch.zeros(4, 9)
    for token in x:
        weights, chosen = (router @ token).softmax(-1).topk(2)
        gate, up = (base_in @ token).chunk(2)
        for w, e in zip(weights / weights.sum(), chosen, strict=True):
            wanted[e] += (w * functional.silu(gate) * up) ** 2
    torch.testing.assert_close(usage(x, router, base_in, base_out, 2), wanted.sqrt() * base_out.norm(dim=0))


@settings(max_examples=40, deadline=None)
@given(experts=st.integers(1, 6), width=st.integers(1, 40), drop=st.floats(0, 0.9), seed=st.integers(0, 99))
def test_every_expert_loses_the_same_number_those_least_its_own(experts, width, drop, seed):
    used = torch.rand(experts, width, generator=torch.Generator().manual_seed(seed))
    keep = kept(used, drop)
    assert keep.shape == used.shape
    assert (keep.sum(1) == width - round(drop * width)).all()
    score = used / used.mean(0)
    for row, own in zip(keep, score, strict=True):
        if 0 < int(row.sum()) < len(row):
            assert float(own[~row].max()) <= float(own[row].min())


def test_a_neuron_nobody_uses_is_no_error():
    used = torch.ones(3, 8)
    used[:, 2] = 0
    assert not kept(used, 0.125)[:, 2].any()
