"""Balance the bundled demo model only as far as its perplexity is shown to bear, in Python.

python examples/balance_under_a_bound.py
"""

import equipoise as eq
from equipoise.demo import calibration_text
from equipoise.evaluation import batches, windows
from equipoise.files.text import read_texts
from equipoise.models import load_model

loaded = load_model("demo")
model, tokenizer = loaded.model, loaded.tokenizer

# Text that calibrates and text that judges plans: different documents.
documents = read_texts([calibration_text()])
half = len(documents) // 2


def some(part):
    """Every fourth window of some documents (a mix of their domains), as batches the model takes."""
    return batches(windows(tokenizer, part, seq_len=256)[::4], batch_size=8, config=model.config)


calibration, judging = some(documents[:half]), some(documents[half:])

profile = eq.profile(model, calibration)
found = eq.gate("demo", profile, text=judging, max_perplexity_rise=0.1)
for plan in found.candidates:
    print(f"LIS {plan.lis:.2f}  {plan.state:9}  {plan.reason}")

eq.apply(model, found.plan)
