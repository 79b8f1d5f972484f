"""benchmarks/paper/batches.py: padding's routing of smaller batches from one run, counts, and the words chosen."""

import numpy as np
import pytest
import torch
from paper_modules import prompt_counts, scripts
from transformers import MixtralConfig, MixtralForCausalLM

import equipoise as eq
from equipoise.profiling.recording import record_sequences

batches = scripts.batches
EXPERTS, LAYERS, TOP_K = 4, 2, 2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=60, hidden_size=32, intermediate_size=16, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K, max_position_embeddings=64,
        pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def rows(number: int = 8) -> list[list[int]]:
    draw = np.random.default_rng(3)
    return [draw.integers(1, 60, draw.integers(3, 20)).tolist() for _ in range(number)]


def every_position(model, texts, side):
    """What a counter without any notion of padding counts in one forward: [L, E]."""
    batch = batches.padded(texts, side, 0)
    chosen = []
    with eq.watch(model, lambda row, layer, routing, real: chosen.append(routing.index)):
        model.base_model(**batch, use_cache=False)
    return np.stack([np.bincount(ids.ravel().numpy(), minlength=EXPERTS) for ids in chosen])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [2, 4])
def test_smaller_batches_follow_from_one_run(model, side, size):
    texts = rows()
    lengths = [len(text) for text in texts]
    with torch.no_grad():
        text = np.concatenate(list(record_sequences(model, scripts.prompts.batched(texts, 8))))
        pads = batches.pad_routing(model, texts, side, 0, len(texts))
        assert [len(ids) for ids in pads] == [max(lengths) - n for n in lengths]
        counts = batches.batch_counts(text, lengths, size, pads)
        truth = np.stack([every_position(model, texts[i : i + size], side) for i in range(0, len(texts), size)])
    np.testing.assert_array_equal(counts, truth)


def test_without_padding_counts_are_the_prompts():
    text = prompt_counts(10)
    lengths = (text[:, 0].sum(-1) // 2).tolist()
    counts = batches.batch_counts(text, lengths, 4)
    np.testing.assert_array_equal(counts, [text[:4].sum(0), text[4:8].sum(0)])


def test_merging_batches_cannot_raise_the_weighted_mean():
    text = prompt_counts(32, skew=2.0)
    lengths = (text[:, 0].sum(-1) // 2).tolist()
    weighted = []
    for size in batches.SIZES:
        counts = batches.batch_counts(text, lengths, size)
        weighted.append((eq.lis(counts) * counts.sum(-1)).sum(0) / counts.sum((0, 2)))
    assert (np.diff(weighted, axis=0) <= 1e-12).all()
    assert (weighted[-1] < weighted[0]).any()


def test_share_of_padding():
    assert batches.pad_share([3, 5, 4, 4], 2) == pytest.approx(2 / 18)
    assert batches.pad_share([3, 5], 1) == 0


def values(text, left, pooled):
    sizes = {
        str(size): {
            "pads": 0.1 * i, "text_all": text[i], "text": text[i], "text_pooled": 1.2, "left": left[i],
            "left_pooled": pooled[i], "right": text[i], "right_pooled": 1.2,
        }
        for i, size in enumerate(batches.SIZES)
    }  # fmt: skip
    task = {"prompts": 32, "all_prompts": 32, "sizes": sizes, "left_pads_lis": 3.5, "right_pads_lis": None}
    return {"pad_token": "<pad>", "most": 4.0, "tasks": {"mmlu": task}}


def test_words_follow_the_figures(tmp_path):
    falls, rises, level = np.linspace(1.5, 1.2, 6), np.linspace(1.5, 2.0, 6), np.full(6, 1.2)
    padding = batches.section(values(falls, rises, rises), tmp_path, quick=True).text
    assert "is seen here only where padding is counted" in padding
    assert "counts" not in padding or "on the left" in padding
    nothing = batches.verdict(values(falls, falls, level))
    assert "is not seen here" in nothing
    text = batches.verdict(values(rises, rises, rises))
    assert "agrees with the paper's finding" in text
    assert "gives no rise" not in text
    assert (tmp_path / "batches.png").stat().st_size > 10_000
