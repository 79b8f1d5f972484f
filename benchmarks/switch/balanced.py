"""R&Q on a small Switch Transformer through the product itself: profile, plan with preset `paper`, apply, measure.

The profile is taken on the training pairs (answers forced), the plan is scored on the test questions. The lower
precision is what the paper takes for Switch and the preset for float32 models: float16.
"""

from __future__ import annotations

import time
from typing import Any

import finetune
import task

import equipoise as eq
from equipoise.options import PlanOptions


def balance(model: Any, work: finetune.Task, tokenizer: Any) -> finetune.Measured:
    """Apply R&Q to a model in memory and measure it. The model is changed."""
    begin = time.monotonic()
    calibration = list(task.forced(work.pairs, tokenizer))
    profile = eq.profile(model, calibration, data="WikiQA dev, pairs of question and answer")
    plan = eq.plan(profile, PlanOptions(preset="paper"))
    eq.apply(model, plan)
    about = {
        "seconds": round(time.monotonic() - begin, 1),
        "precision": sorted({slot.precision for layer in plan.layers for slot in layer.slots}),
        "bytes": round(plan.budget.plan_bytes / plan.budget.original_bytes, 4),
        "replicas": plan.num_replicas,
        "heavy": [int(n.argmax()) for n in profile.counts],
    }
    return finetune.measure(model, work, tokenizer, about)
