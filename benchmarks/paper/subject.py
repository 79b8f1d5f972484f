"""The model under test: one calibration, the plans and LASER's thresholds made from it, and its variants.

    original       the reference model
    paper          R&Q: one replica of the heavy hitter a layer, replicas and least important experts in int8
    joint          replicas and precision together at budget 1.0
    laser          LASER, thresholds calibrated to an increase of the loss of `LASER_BOUND`
    joint + laser  LASER on the joint model, calibrated there

Calibration is the first tenth of the prompts of every task, nothing else; one plan serves all tasks. Models are read
when they are needed and stay (three of 2.8 GB in float32). Everything is kept in the run's directory (`cells.Store`).

Where the processor has no bfloat16 products, a bfloat16 checkpoint is computed in float32, which is several times
faster there. Plans and bytes are those of the checkpoint all the same (`as_stored`, `as_computed`): what is held as
int8 is rounded to int8, what is not stays as it is.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import prompts
import torch
from cells import Store, fingerprint

import equipoise as eq
from equipoise.evaluation.data import Batch
from equipoise.models import load_model
from equipoise.models.loading import default_device
from equipoise.options import ProfileOptions
from equipoise.rerouting import Thresholds, calibrate, installed
from equipoise.runtime.kernels.packed import can_pack
from equipoise.types import Budget, IntArray, Plan, Profile

VARIANTS = ("original", "paper", "joint", "laser", "joint + laser")
LASER_BOUND = 0.005
WINDOW = 256


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        prompts: of a task whose routing is recorded, calibration included.
        lis: of a task for the LIS of each variant, in the model.
        items: of a task for accuracy, for original and joint.
        others: the same for R&Q.
        subject_items, subject_others: the same of each of MMLU's 57 subjects.
        lis_rerouted: the same for the variants with LASER, a prompt a forward on any device.
        rerouted, subject_rerouted: for the variants with LASER, which read every answer apart: two to three times the
            tokens.
        windows: of a domain, to plan on and to score on.
        laser_windows: of calibration text, for LASER's thresholds (it is read some twenty times).
    """

    prompts: int = 400
    lis: int = 100
    lis_rerouted: int = 100
    items: int = 1000
    others: int = 300
    subject_items: int = 20
    subject_others: int = 6
    rerouted: int = 100
    subject_rerouted: int = 6
    windows: int = 24
    laser_windows: int = 32

    def scaled(self, share: float) -> Sizes:
        """A share of everything, at least as much as the quick form."""
        return Sizes(
            **{
                field.name: max(getattr(QUICK, field.name), round(share * getattr(self, field.name)))
                for field in dataclasses.fields(self)
            }
        )


QUICK = Sizes(
    prompts=32, lis=2, lis_rerouted=2, items=2, others=2, subject_items=1, subject_others=1, rerouted=2,
    subject_rerouted=1, windows=1, laser_windows=1,
)  # fmt: skip
QUICK_PROMPT, QUICK_LASER, QUICK_REST, QUICK_SUBJECTS = 32, 64, 2, 3
"""Of the quick form: tokens of a prompt where it is not cut into windows, and of a window for LASER's thresholds;
windows of the rest; subjects of MMLU."""
LARGE = Sizes(
    lis_rerouted=60, items=2500, others=2500, subject_items=60, subject_others=60, rerouted=200, subject_rerouted=8
)
"""About 13,000 documents: a pooled change to within 0.3 to 0.4 points."""
WIDE = 64
"""Rows a forward on a GPU, which fewer leave idle."""


class Subject:
    """The model under test.

    Args:
        moe: checkpoint directory of the reference model.
        data: directory of the benchmark files.
        store: keeps what is measured.
        quick: the small form.
        dtype: to compute in; None: the checkpoint's, or float32 where that is faster.
        share: of the full form's documents, for slow machines.
        large: as many documents as a pooled accuracy to within half a point needs.
        device: to compute on; None: as `load_model` chooses. Cells do not depend on it, but for speed.
    """

    def __init__(
        self, moe: Path, data: Path, store: Store, quick: bool, dtype: str | None = None, share: float = 1.0,
        large: bool = False, device: str | None = None,
    ) -> None:  # fmt: skip
        self.moe, self.data, self.store, self.quick = moe, data, store, quick
        self.device = torch.device(device or default_device())
        fast = self.device.type == "cuda" or can_pack(torch.bfloat16)
        self.dtype = dtype or ("auto" if fast else "float32")
        self.share, self.large = share, large
        self.sizes = QUICK if quick else (LARGE if large else Sizes()).scaled(share)
        self.identity = fingerprint(moe)
        self._held: dict[str, Any] = {}
        self._form = {"quick": [QUICK_PROMPT, QUICK_LASER, QUICK_REST, QUICK_SUBJECTS]} if quick else {}

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Of the model."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.moe)

    def inputs(self, **more: Any) -> dict[str, Any]:
        """What every cell depends on, and more."""
        return {
            "model": self.identity,
            "dtype": self.dtype,
            "calibration": [self.sizes.prompts, prompts.CALIBRATION, WINDOW],
            **self._form,
            **more,
        }

    def rows(self, least: int) -> int:
        """Rows a forward where that changes nothing but speed: `least` on a processor, `WIDE` or more on a GPU."""
        return least if self.device.type == "cpu" else max(least, WIDE)

    @functools.cache  # noqa: B019 - one subject a run
    def _whole(self, task: str) -> list[list[int]]:
        return prompts.prompts(task, self.data, self.tokenizer, self.sizes.prompts)

    def prompts(self, task: str) -> list[list[int]]:
        """Token ids of a task's prompts; the first tenth is for calibration."""
        return [row[:QUICK_PROMPT] for row in self._whole(task)] if self.quick else self._whole(task)

    def routing(self, task: str) -> IntArray:
        """Selections of each prompt of a task in the original model: int64 [P, L, E]."""
        made = self.store.arrays(
            f"routing/{task}",
            {
                "model": self.identity,
                "dtype": self.dtype,
                "prompts": self.sizes.prompts,
                "longest": prompts.LONGEST,
                **self._form,
            },
            lambda: {"counts": prompts.routing(self.model("original").model, self.prompts(task), self.rows(16))},
            [prompts],
        )
        return made["counts"]

    def rest(self, task: str) -> IntArray:
        """`routing` of the prompts that calibration has not seen."""
        counts = self.routing(task)
        return counts[prompts.calibration(len(counts)) :]

    def windows(self, part: str = "calibration", most: int = 0, width: int = WINDOW) -> list[Batch]:
        """Windows of the tasks' prompts, in batches of 8 that know their tasks.

        Args:
            part: `calibration`, or as many prompts of each task of the `rest`.
            most: so many windows, spread evenly (0 = all).
            width: tokens of a window.
        """
        if self.quick and part == "rest":
            most = most or QUICK_REST
        rows: list[list[int]] = []
        names: list[str] = []
        for task in prompts.TASKS:
            own = self._whole(task)
            first = prompts.calibration(len(own))
            chosen = own[:first] if part == "calibration" else own[first : 2 * first]
            made = prompts.joined(chosen, width, self.tokenizer.eos_token_id)
            rows += made
            names += [task] * len(made)
        if 0 < most < len(rows):
            kept = [int(i) for i in np.linspace(0, len(rows) - 1, most).round()]
            rows, names = [rows[i] for i in kept], [names[i] for i in kept]
        return [Batch(tensors, tuple(names[8 * i : 8 * i + 8])) for i, tensors in enumerate(prompts.batched(rows, 8))]

    @functools.cached_property
    def profile(self) -> Profile:
        """Load and importance on the calibration windows."""
        path = self.store.path("profile", self.inputs(), [prompts], "npz")

        def make() -> None:
            made = eq.profile(
                self.model("original").model, self.windows(),
                ProfileOptions(
                    importance_tokens=512 if self.quick else 8192, layer_tokens=0 if self.quick else 2048,
                    low_precision="int8",
                ),
                model_name=self.moe.name, data="the first tenth of each task's prompts",
            )  # fmt: skip
            eq.save_profile(as_stored(made) if self.dtype == "float32" else made, path)

        self.store.file(path, "profile", make)
        return eq.load_profile(path)

    @functools.cached_property
    def plans(self) -> dict[str, Plan]:
        """`paper` and `joint`, at their defaults; kept, so that every run of the directory has the same."""
        options: dict[str, dict[str, Any]] = {"paper": {"preset": "paper"}, "joint": {"budget": 1.0}}
        found = {}
        for name, own in options.items():
            path = self.store.path(f"plan {name}", self.inputs(), [prompts], "json")

            def make(own: dict[str, Any] = own, path: Path = path) -> None:
                eq.save_plan(eq.plan(self.profile, **own), path)

            self.store.file(path, f"plan {name}", make)
            found[name] = eq.load_plan(path)
        return found

    def model(self, variant: str) -> Any:
        """A `LoadedModel` of `original`, or with a plan applied."""
        name = variant.removesuffix("+ laser").strip()
        name = "original" if name == "laser" else name
        if name not in self._held:
            loaded = load_model(self.moe, dtype=self.dtype, device=self.device)
            if name != "original":
                self.apply(loaded.model, self.plans[name])
            self._held[name] = loaded
        return self._held[name]

    def copied(self) -> Any:
        """Another original model; copying the one that is held takes a third of the time of reading it."""
        return copy.deepcopy(self.model("original").model)

    def apply(self, model: Any, plan: Plan) -> None:
        """Apply a plan of the checkpoint to a model that was loaded in `dtype`."""
        eq.apply(model, as_computed(plan, self.profile) if self.dtype == "float32" else plan)

    def thresholds(self, variant: str) -> Thresholds | None:
        """LASER's, for the variants that have it; calibrated to `LASER_BOUND` on the calibration windows."""
        if not variant.endswith("laser"):
            return None
        inputs = self.inputs(bound=LASER_BOUND, windows=self.sizes.laser_windows)
        path = self.store.path(f"thresholds {variant}", inputs, [prompts], "json")

        def make() -> None:
            # Batches of 8 on every device: LASER routes by the load of the batch.
            seen = self.windows(most=self.sizes.laser_windows, width=QUICK_LASER if self.quick else WINDOW)
            found = calibrate(self.model(variant).model, seen, max_loss_increase=LASER_BOUND)
            eq.save_laser(found.thresholds, path)

        self.store.file(path, f"thresholds {variant}", make)
        return eq.load_laser(path)

    @contextlib.contextmanager
    def variant(self, name: str) -> Iterator[Any]:
        """The `LoadedModel` of a variant, LASER installed where it has it."""
        thresholds = self.thresholds(name)
        loaded = self.model(name)
        with installed(loaded.model, thresholds) if thresholds is not None else contextlib.nullcontext():
            yield loaded


def as_stored(profile: Profile) -> Profile:
    """A profile that was measured in float32 as that of the bfloat16 checkpoint: its bytes, its precisions."""
    sizes = {"original": profile.expert_bytes["original"] // 2, "int8": profile.expert_bytes["int8"]}
    meta = {**profile.meta, "dtype": "bfloat16"}
    return dataclasses.replace(profile, expert_bytes=sizes, meta=meta)


def as_computed(plan: Plan, profile: Profile) -> Plan:
    """A plan of the bfloat16 checkpoint for the same model held in float32, where an original slot takes twice as much.

    Args:
        plan: of the checkpoint.
        profile: with the checkpoint's sizes (`as_stored`).
    """
    sizes = {name: own.astype(int) * (2 if name == "original" else 1) for name, own in profile.expert_bytes.items()}
    needed = sum(
        int(sizes[slot.precision][row, slot.expert]) for row, layer in enumerate(plan.layers) for slot in layer.slots
    )
    budget = Budget(original_bytes=int(sizes["original"].sum()), limit_bytes=needed, plan_bytes=needed)
    return dataclasses.replace(plan, budget=budget, model=dataclasses.replace(plan.model, dtype="float32"))


def mean_lis(counts: Any) -> float:
    """Mean over layers of the LIS of counts [L, E]."""
    return float(np.mean(eq.lis(np.asarray(counts))))
