"""What `balance` prepares for a gate before a weight is read: text that judges plans, and everything refused early."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.errors import InputError
from equipoise.evaluation.data import Batch, batches, windows
from equipoise.files.text import read_texts
from equipoise.gating.candidates import check_plan_options
from equipoise.gating.reading import check_measures
from equipoise.gating.search import spread
from equipoise.models.loading import ModelSource, load_tokenizer
from equipoise.options import GateOptions, PlanOptions, ProfileOptions
from equipoise.pipeline.text import Split, hold_back


@dataclass(frozen=True)
class Prepared:
    """What a gate is measured on.

    Attributes:
        split: the run's text, less what judges plans.
        text: gate text; empty without a bound on perplexity.
        directory: of the tasks' files; None without tasks.
    """

    split: Split
    text: list[Batch]
    directory: Path | None


def prepare_gate(
    source: ModelSource,
    split: Split,
    options: GateOptions,
    profile_options: ProfileOptions,
    plan_options: PlanOptions,
    data: Sequence[Path] = (),
    heldout: Sequence[Path] = (),
) -> Prepared:
    """Set gate text apart and check all that can be checked without the model's weights.

    Args:
        source: the model.
        split: calibration and held-out windows.
        options: with a bound.
        profile_options: `seq_len` and `batch_size` of gate text too.
        plan_options: must leave a front to search.
        data: calibration files, which gate text must not be among.
        heldout: held-out files, likewise.

    Raises:
        InputError: see `check_plan_options` and `check_measures`; too little text to set some apart.
    """
    check_plan_options(plan_options)
    chosen = []
    same = {path.resolve() for path in options.gate_text} & {path.resolve() for path in (*data, *heldout)}
    if same:
        raise InputError(
            f"gate text {sorted(same)[0]} calibrates or is held out already: what judges plans must be apart from both"
        )
    if options.max_perplexity_rise is not None:
        if options.gate_text:
            chosen = windows(load_tokenizer(source), read_texts(options.gate_text), profile_options.seq_len)
        else:
            used, chosen = hold_back(split.calibration, options.gate_share)
            if len(chosen) < 2:
                raise InputError(
                    f"{split.described}: {len(split.calibration)} calibration windows of {profile_options.seq_len} "
                    f"tokens are too few to keep {options.gate_share:.0%} for the gate: give more text, a shorter "
                    "--seq-len, or --gate-text files"
                )
            described = f"{split.described}, but for the last {options.gate_share:.0%} of each domain (gate text)"
            split = Split(used, split.heldout, described)
        if options.gate_limit:
            chosen = spread(chosen, options.gate_limit)
    text = batches(chosen, profile_options.batch_size, source.config) if chosen else []
    return Prepared(split, text, check_measures(options, text))


def gate_as_json(options: GateOptions) -> dict[str, Any]:
    """The options as JSON values."""
    found = dataclasses.asdict(options)
    found["gate_tasks"] = list(options.gate_tasks)
    found["gate_text"] = [str(path) for path in options.gate_text]
    found["task_data"] = None if options.task_data is None else str(options.task_data)
    return found
