"""Options: each value that makes no sense is refused in one line when the dataclass is built."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from equipoise.errors import InputError
from equipoise.options import EvalOptions, PlanOptions, ProfileOptions
from equipoise.pipeline.balance import BalanceOptions

WRONG: list[tuple[type, dict[str, Any], str]] = [
    (ProfileOptions, {"seq_len": 0}, "seq_len must be at least 1, got 0"),
    (ProfileOptions, {"batch_size": -1}, "batch_size must be at least 1"),
    (ProfileOptions, {"windows": 0}, "windows must be at least 1"),
    (ProfileOptions, {"max_tokens": -1}, "max_tokens must not be negative"),
    (ProfileOptions, {"importance_tokens": -1}, "importance_tokens must not be negative"),
    (ProfileOptions, {"layer_tokens": -1}, "layer_tokens must not be negative"),
    (ProfileOptions, {"fraction": 0.0}, "fraction must be in (0, 1]"),
    (ProfileOptions, {"fraction": 1.01}, "fraction must be in (0, 1]"),
    (ProfileOptions, {"fraction": math.nan}, "fraction must be in (0, 1]"),
    (ProfileOptions, {"low_precision": "int4"}, "low precision: 'int4' is not one of int8, int8_weight_only, float16"),
    (PlanOptions, {"preset": "best"}, "preset: 'best' is not one of joint, paper"),
    (PlanOptions, {"strategy": "none"}, "strategy: 'none' is not one of rq, quantize-only"),
    (
        PlanOptions,
        {"importance": "loss"},
        "importance: 'loss' is not one of error, output_error, wanda, frequency, random",
    ),
    (PlanOptions, {"low_precision": "int4"}, "low precision: 'int4' is not one of int8, int8_weight_only, float16"),
    (PlanOptions, {"budget": 0.0}, "budget is a multiple"),
    (PlanOptions, {"budget": -1.0}, "budget is a multiple"),
    (PlanOptions, {"budget": math.nan}, "budget is a multiple"),
    (PlanOptions, {"budget": math.inf}, "budget is a multiple"),
    (PlanOptions, {"max_quantized": -0.1}, "max-quantized is a share"),
    (PlanOptions, {"max_quantized": 1.1}, "max-quantized is a share"),
    (PlanOptions, {"max_quantized": math.nan}, "max-quantized is a share"),
    (PlanOptions, {"replicas": -1}, "replicas must not be negative"),
    (PlanOptions, {"expert_bytes": 0}, "expert-bytes must be at least 1"),
    (PlanOptions, {"ranks": 0}, "ranks (0) must be at least 1"),
    (PlanOptions, {"nodes": 0}, "ranks (1) must be at least 1"),
    (PlanOptions, {"ranks": 4, "nodes": 3}, "divisible by nodes (3)"),
    (PlanOptions, {"slots": -1}, "slots must not be negative"),
    (PlanOptions, {"groups": -1}, "groups must not be negative"),
    (PlanOptions, {"groups": 2}, "groups is for group-limited placement"),
    (PlanOptions, {"shares": "odd"}, "shares: 'odd' is not one of merged, even, lp"),
    (PlanOptions, {"quality_weight": -1.0}, "quality-weight must be in"),
    (PlanOptions, {"quality_weight": math.nan}, "quality-weight must be in"),
    (PlanOptions, {"slot_weight": math.inf}, "slot-weight must be in"),
    (PlanOptions, {"robust_windows": 0}, "robust-windows must be at least 1"),
    (PlanOptions, {"guard": math.nan}, "guard is a number of standard errors, 0 or more"),
    (PlanOptions, {"seed": -1}, "seed must not be negative"),
    (EvalOptions, {"seq_len": 1}, "seq-len must be at least 2"),
    (EvalOptions, {"batch_size": 0}, "batch-size must be at least 1"),
    (EvalOptions, {"limit": -1}, "limit and fewshot must not be negative"),
    (EvalOptions, {"fewshot": -1}, "limit and fewshot must not be negative"),
    (EvalOptions, {"dtype": "int8"}, "dtype: 'int8' is not one of"),
    (BalanceOptions, {"calibration": 0.0}, "calibration is a share"),
    (BalanceOptions, {"calibration": 1.0}, "calibration is a share"),
    (BalanceOptions, {"calibration": math.nan}, "calibration is a share"),
    (BalanceOptions, {"eval_tokens": -1}, "eval-tokens must not be negative"),
]


@pytest.mark.parametrize(("kind", "values", "message"), WRONG)
def test_wrong_values_are_refused(kind: type, values: dict[str, Any], message: str):
    with pytest.raises(InputError) as caught:
        kind(**values)
    assert str(caught.value).startswith(message) or message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_field_is_checked_or_free():
    """A new field must be given a wrong value above, or be named here as one that has none."""
    free = {"wanda_low_is_important", "group_limited", "sensitivity"}
    for kind in (ProfileOptions, PlanOptions, EvalOptions, BalanceOptions):
        tried = {name for k, values, _ in WRONG if k is kind for name in values}
        assert {field.name for field in dataclasses.fields(kind)} - free == tried


@pytest.mark.parametrize("kind", [ProfileOptions, PlanOptions, EvalOptions, BalanceOptions])
def test_options_are_frozen_and_know_their_fields(kind: type):
    made = kind()
    name = dataclasses.fields(kind)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, name, 1)
    with pytest.raises(TypeError):
        kind(no_such_option=1)


def test_messages_are_one_line():
    assert str(InputError("a\n  b\tc")) == "a b c"
