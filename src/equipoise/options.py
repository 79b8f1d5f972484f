"""Options of each stage: frozen dataclasses, validated when built. The command line reads its defaults here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from equipoise.checks import at_least, one_of
from equipoise.errors import InputError

LowPrecision = Literal["int8", "int8_weight_only", "float16"]
Preset = Literal["joint", "paper"]
ImportanceName = Literal["error", "output_error", "wanda", "frequency", "random"]
Shares = Literal["merged", "even", "lp"]
Strategy = Literal["rq", "quantize-only", "random", "quantize-heavy", "quantize-all"]


@dataclass(frozen=True)
class ProfileOptions:
    """How load and importance are measured.

    Attributes:
        seq_len: tokens a window of text.
        batch_size: windows a forward pass.
        max_tokens: stop after about this many tokens (0 = all of the data).
        fraction: share of the data's windows to use, spread evenly (the paper uses 0.1).
        windows: at most this many load windows are kept in `series`.
        importance_tokens: tokens on which `wanda` and `error` are measured, spread over the batches (0 = none).
        sensitivity: weight `error` by what the model's predictions feel of it, with a backward pass over those tokens.
            Without it `error` is that of the layer's output, which says less about the loss.
        layer_tokens: of those, tokens on which the model is run again for each layer, with all its experts lowered,
            to measure what the layer is worth (0 = gradients alone say; without sensitivity nothing does).
        low_precision: precision that `error` is measured for; plan with the same. None: int8 for 16-bit models,
            float16 for float32 models.
    """

    seq_len: int = 256
    batch_size: int = 8
    max_tokens: int = 0
    fraction: float = 1.0
    windows: int = 64
    importance_tokens: int = 2048
    sensitivity: bool = True
    layer_tokens: int = 2048
    low_precision: LowPrecision | None = None

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "windows"):
            at_least(name, getattr(self, name), 1)
        for name in ("max_tokens", "importance_tokens", "layer_tokens"):
            at_least(name, getattr(self, name), 0)
        if not 0 < self.fraction <= 1:
            raise InputError(f"fraction must be in (0, 1], got {self.fraction}")
        if self.low_precision is not None:
            one_of("low precision", self.low_precision, get_args(LowPrecision))


@dataclass(frozen=True)
class PlanOptions:
    """How a plan is made.

    Attributes:
        preset: `joint` plans replicas and precision together; `paper` is R&Q Algorithms 1 to 3.
        budget: bytes allowed, as a multiple of the original expert bytes. None: 1.0 for `joint`; for `paper`
            what the algorithm needs (int8 scales put it a trace above 1.0).
        max_quantized: share of a layer's experts that may lose their original-precision copy.
        importance: which importance ranks the experts. None: `wanda` for `paper`; for `joint` `error` where it was
            measured, else `frequency` (traces).
        wanda_low_is_important: the paper's reading of Algorithm 2 ("lower means higher importance").
        strategy: the paper's ablation (Table 3); `rq` is the method itself.
        low_precision: precision of replicas and quantized experts. None: what the profile measured `error` for; else
            int8 for 16-bit models, float16 for float32 models.
        replicas: exactly this many spare slots in each layer, instead of as many as the budget buys.
        ranks: devices the slots are placed on.
        nodes: nodes the ranks are on.
        slots: slots a layer on all ranks together (0 = whatever the plan gives, rounded up to the ranks).
        group_limited: node-limited routing: experts of a group stay on one node.
        groups: expert groups of the router, with group-limited (0 = one group a node).
        shares: how slots share an expert's tokens: `even`; `merged`, even but that where EPLB's plan is kept and has an
            expert on a rank twice, one slot takes both shares and another expert's stands by in the second's place
            (every rank carries what EPLB gives it); or `lp`, the split that makes the busiest rank least. Engines that
            only split evenly need `even`.
        expert_bytes: original bytes of one expert, for traces that carry no sizes; the lower precision counts as half.
        quality_weight: how much predicted quality loss weighs against imbalance in `joint`.
        slot_weight: how much LIS a doubling of a layer's slots must be worth in `joint` (0: fill the budget).
        robust_windows: plan on at most so many windows of the profile, shrunk for their size (1: only its total).
        guard: standard errors by which a plan from windows must beat EPLB's on windows left out; else a layer is placed
            on ranks as EPLB does (0: never ask, inf: always EPLB). Not with group-limited or preset `paper`.
        seed: of everything random.
    """

    preset: Preset = "joint"
    budget: float | None = None
    max_quantized: float = 1.0
    importance: ImportanceName | None = None
    wanda_low_is_important: bool = True
    strategy: Strategy = "rq"
    low_precision: LowPrecision | None = None
    replicas: int | None = None
    ranks: int = 1
    nodes: int = 1
    slots: int = 0
    group_limited: bool = False
    groups: int = 0
    shares: Shares = "merged"
    expert_bytes: int | None = None
    quality_weight: float = 1.0
    slot_weight: float = 0.7
    robust_windows: int = 16
    guard: float = 2.5
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("preset", self.preset, get_args(Preset))
        one_of("strategy", self.strategy, get_args(Strategy))
        if self.importance is not None:
            one_of("importance", self.importance, get_args(ImportanceName))
        if self.low_precision is not None:
            one_of("low precision", self.low_precision, get_args(LowPrecision))
        if self.budget is not None and not 0 < self.budget < 1000:
            raise InputError(
                f"budget is a multiple of the original expert bytes and must be above 0, got {self.budget}"
            )
        if not 0 <= self.max_quantized <= 1:
            raise InputError(f"max-quantized is a share of a layer's experts in [0, 1], got {self.max_quantized}")
        if self.replicas is not None:
            at_least("replicas", self.replicas, 0)
        if self.expert_bytes is not None:
            at_least("expert-bytes", self.expert_bytes, 1)
        if self.ranks < 1 or self.nodes < 1 or self.ranks % self.nodes:
            raise InputError(f"ranks ({self.ranks}) must be at least 1 and divisible by nodes ({self.nodes})")
        one_of("shares", self.shares, get_args(Shares))
        for name in ("slots", "groups"):
            at_least(name, getattr(self, name), 0)
        if self.groups and not self.group_limited:
            raise InputError("groups is for group-limited placement: add group-limited, or leave it out")
        for name in ("quality_weight", "slot_weight"):
            if not 0 <= getattr(self, name) < 1e6:
                raise InputError(f"{name.replace('_', '-')} must be in [0, 1e6), got {getattr(self, name)}")
        at_least("robust-windows", self.robust_windows, 1)
        if not self.guard >= 0:
            raise InputError(f"guard is a number of standard errors, 0 or more (or inf), got {self.guard}")
        at_least("seed", self.seed, 0)


@dataclass(frozen=True)
class EvalOptions:
    """How a model is evaluated.

    Attributes:
        seq_len: tokens a window of text.
        batch_size: windows, or requests of the harness, a forward pass.
        limit: at most this many windows of text, spread evenly, and documents a task, the first (0 = all).
        fewshot: examples in a task's prompt. None: as the task says.
        dtype: dtype to load the model in (`auto`: the checkpoint's own).
    """

    seq_len: int = 256
    batch_size: int = 8
    limit: int = 0
    fewshot: int | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise InputError(f"seq-len must be at least 2 (one token to read, one to predict), got {self.seq_len}")
        at_least("batch-size", self.batch_size, 1)
        if self.limit < 0 or (self.fewshot is not None and self.fewshot < 0):
            raise InputError(f"limit and fewshot must not be negative, got {self.limit} and {self.fewshot}")
        one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))


@dataclass(frozen=True)
class GateOptions:
    """How far quality may fall, and what that is measured on. Without a bound there is no gate.

    Attributes:
        max_accuracy_drop: accuracy gate: points that accuracy on the gate tasks may fall, at the worse end of its
            paired 95 % interval. Of all their documents together, so a large task counts for more.
        max_perplexity_rise: perplexity gate: percent that perplexity on the gate text may rise, at the worse end of its
            paired 95 % interval. With both gates both must hold.
        gate_tasks: tasks of lm-evaluation-harness, as `eval` runs them.
        task_data: directory of the tasks' files; None: from the environment (EQUIPOISE_TASK_DATA).
        gate_text: text that judges plans, apart from calibration and held-out text.
        gate_share: without gate text: share of the calibration windows that judges plans instead of calibrating, the
            last of each domain. Held-out text is never used: choosing a plan on it would flatter the report.
        gate_limit: at most this many documents a gate task, the first, and windows of gate text, spread evenly
            (0 = all).
        gate_tries: plans of the front that may be tried, spread over it; each is loaded and measured.
    """

    max_accuracy_drop: float | None = None
    max_perplexity_rise: float | None = None
    gate_tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    gate_text: tuple[Path, ...] = ()
    gate_share: float = 0.25
    gate_limit: int = 0
    gate_tries: int = 8

    def __post_init__(self) -> None:
        for name, most in (("max_accuracy_drop", 100.0), ("max_perplexity_rise", 1e6)):
            value = getattr(self, name)
            if value is not None and not 0 < value <= most:
                raise InputError(f"{name.replace('_', '-')} must be above 0 and at most {most:g}, got {value}")
        if not 0 < self.gate_share < 1:
            raise InputError(f"gate-share is a share of the calibration windows in (0, 1), got {self.gate_share}")
        at_least("gate-limit", self.gate_limit, 0)
        at_least("gate-tries", self.gate_tries, 1)
        if not self.active:
            changed = [f.name.replace("_", "-") for f in fields(self) if getattr(self, f.name) != f.default]
            if changed:
                raise InputError(
                    f"{changed[0]} is for a gate, which needs a bound: give max-accuracy-drop or max-perplexity-rise"
                )
            return
        if self.max_accuracy_drop is not None and not self.gate_tasks:
            raise InputError(
                "max-accuracy-drop needs tasks to measure accuracy on: give gate-tasks, e.g. piqa,arc_easy"
            )
        for name, given, bound in (
            ("gate-tasks", bool(self.gate_tasks), self.max_accuracy_drop),
            ("task-data", self.task_data is not None, self.max_accuracy_drop),
            ("gate-text", bool(self.gate_text), self.max_perplexity_rise),
        ):
            if given and bound is None:
                other = "max-perplexity-rise" if name == "gate-text" else "max-accuracy-drop"
                raise InputError(f"{name} is given, but there is no bound for it: give {other} too, or leave it out")

    @property
    def active(self) -> bool:
        """True when there is a bound."""
        return self.max_accuracy_drop is not None or self.max_perplexity_rise is not None
