"""`gate`: search the front for the most balanced plan whose measured loss is shown to stay inside a bound.

A plan changes a model in place and cannot be taken back, so each plan that is tried gets a model of its own, loaded
anew and dropped afterwards: one model in memory at a time. Every plan meets the same items in the same batches as the
original, so differences are paired. `search` has the order in which plans are tried, and why.

Cost: one load and one pass over the gate's items a plan tried, and one pass of the original.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from equipoise.errors import InputError
from equipoise.evaluation.data import Batch
from equipoise.gating.candidates import candidates, check_plan_options
from equipoise.gating.reading import Reading, check_measures, read
from equipoise.gating.result import Candidate, GateResult, State
from equipoise.gating.search import search
from equipoise.gating.verdict import Verdict
from equipoise.models.loading import load_model
from equipoise.options import GateOptions, PlanOptions
from equipoise.progress import Track, quietly
from equipoise.runtime import apply
from equipoise.types import Plan, Profile


def gate(
    model: str | Path,
    profile: Profile,
    options: GateOptions | None = None,
    *,
    text: Sequence[Batch] = (),
    plan_options: PlanOptions | None = None,
    batch_size: int = 8,
    original: Reading | None = None,
    track: Track = quietly,
    **overrides: Any,
) -> GateResult:
    """Find the most balanced plan of the joint front that keeps to the bounds on a model's quality.

        found = eq.gate("demo", profile, text=batches, max_perplexity_rise=0.1)
        eq.apply(model, found.plan)

    Args:
        model: directory or hub id of the original model; it is loaded once for every plan tried.
        profile: of that model.
        options: bounds, tasks and limits; `gate_text` and `gate_share` are for `balance`, here `text` is given.
        text: batches for a bound on perplexity. The profile must not have seen them, and what the result is to be
            reported on should not be among them.
        plan_options: preset joint, budget 1 or more.
        batch_size: requests of the harness a forward pass.
        original: what `read` gave for the original model; None: it is measured here.
        track: progress.
        **overrides: fields of `GateOptions` that replace those of `options`.

    Returns:
        The accepted plan, and every other of the front with what was measured and why it was refused.

    Raises:
        InputError: no bound; options that contradict each other; unknown tasks, missing data, too few documents.
    """
    chosen = gate_options(options, overrides)
    planning = plan_options or PlanOptions()
    check_plan_options(planning)
    directory = check_measures(chosen, text)
    began = time.monotonic()
    points, unchanged = candidates(profile, planning, chosen.gate_tries)
    measured: dict[int, tuple[Verdict, ...]] = {}

    def reading(plan: Plan | None) -> Reading:
        loaded = load_model(model, tokenizer=directory is not None)
        if plan is not None:
            apply(loaded.model, plan)
        found = read(loaded, chosen, text, directory, batch_size, track)
        del loaded
        gc.collect()  # modules hold themselves in cycles; the next model needs the room
        return found

    before = original if original is not None else reading(None)

    def inside(index: int) -> bool:
        measured[index] = reading(points[index].plan).against(before, chosen)
        return all(verdict.inside for verdict in measured[index])

    accepted = search(len(points), inside)
    rows = []
    for i, point in enumerate(points):
        verdicts = measured.get(i, ())
        rows.append(Candidate(point.plan, point.quality_weight, _state(i, accepted, verdicts), verdicts))
    rows.append(Candidate(unchanged, None, "accepted" if accepted is None else "not tried"))
    items = {}
    if before.accuracy is not None:
        items["documents"] = len(before.accuracy.values)
    if before.perplexity is not None:
        items["windows"] = len(before.perplexity.values)
    return GateResult(chosen, tuple(rows), items, time.monotonic() - began)


def gate_options(options: GateOptions | None, overrides: dict[str, Any]) -> GateOptions:
    """Options with fields replaced, and a bound among them.

    Raises:
        InputError: an unknown field, or no bound.
    """
    # The bound may be among the overrides, so the options are built once, at the end.
    try:
        chosen = replace(options, **overrides) if options is not None else GateOptions(**overrides)
    except TypeError as error:
        raise InputError(f"gate option: {error}") from error
    if not chosen.active:
        raise InputError("a gate needs a bound: give max_accuracy_drop or max_perplexity_rise")
    return chosen


def _state(index: int, accepted: int | None, verdicts: tuple[Verdict, ...]) -> State:
    if index == accepted:
        return "accepted"
    if not verdicts:
        return "not tried"
    return "passed" if all(verdict.inside for verdict in verdicts) else "refused"
