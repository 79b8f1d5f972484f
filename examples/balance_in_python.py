"""Balance the bundled demo model in Python, step by step.

python examples/balance_in_python.py
"""

import torch

import equipoise as eq
from equipoise.demo import calibration_text, heldout_text
from equipoise.evaluation import batches, evaluate_text, windows
from equipoise.files.text import read_texts
from equipoise.models import load_model

loaded = load_model("demo")
model, tokenizer = loaded.model, loaded.tokenizer


def some(path):
    """Every fifth window of a text file (a mix of its domains), as batches the model takes."""
    return batches(windows(tokenizer, read_texts([path]), seq_len=256)[::5], batch_size=8, config=model.config)


calibration, heldout = some(calibration_text()), some(heldout_text())

# 1. Measure: load of every expert, and what lowering its precision would cost.
profile = eq.profile(model, calibration)
print("LIS on calibration text, by layer:", eq.lis(profile.counts).round(2))

# 2. Plan: replicas of the busy, int8 for those that bear it, never more bytes than before.
plan = eq.plan(profile, budget=1.0)
print(f"{plan.num_replicas} replicas, {plan.num_quantized} experts in int8 only,", plan.budget)

# 3. Watch the original on other text, apply, watch again.
with eq.watch(model) as load:
    before = evaluate_text(model, heldout)
print(f"before: LIS {eq.lis(load.counts).mean():.2f}, perplexity {before.perplexity:.2f}")

eq.apply(model, plan)
with eq.watch(model) as load:
    after = evaluate_text(model, heldout)
experts = profile.num_experts
lis = torch.tensor([float(eq.slot_lis(slots, experts)) for slots in load.slot_counts])
print(f"after:  LIS {lis.mean():.2f}, perplexity {after.perplexity:.2f}")
