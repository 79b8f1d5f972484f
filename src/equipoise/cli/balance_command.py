"""`equipoise balance`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from equipoise.cli import console
from equipoise.cli.dataclass_options import options_of, take
from equipoise.errors import InputError
from equipoise.gating.verdict import UNITS, plain
from equipoise.options import GateOptions, PlanOptions, ProfileOptions
from equipoise.pipeline.balance import BalanceOptions, BalanceResult, balance
from equipoise.reporting.gate_metrics import FrontEntry, Gate


@click.command(name="balance")
@click.argument("model", required=False)
@click.option("--data", multiple=True, type=click.Path(path_type=Path), help="Calibration text: .jsonl(.gz) or .txt.")
@click.option(
    "--heldout", multiple=True, type=click.Path(path_type=Path), help="Text to score on; else part of --data."
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("equipoise-run"), show_default=True, help="Run directory."
)
@click.option("--force", is_flag=True, help="Replace an existing run directory.")
@options_of(BalanceOptions)
@options_of(PlanOptions, leave_out=("expert_bytes", "slots", "nodes", "group_limited"))
@options_of(ProfileOptions, leave_out=("low_precision",))
@click.option("--gate-tasks", metavar="NAME[,NAME...]", help="Tasks of the accuracy gate, as `eval --tasks` runs them.")
@click.option(
    "--task-data",
    type=click.Path(path_type=Path),
    help="Directory of the tasks' files; else from EQUIPOISE_TASK_DATA.",
)
@click.option(
    "--gate-text",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Text of the perplexity gate, apart from calibration and held-out text; else see --gate-share.",
)
@options_of(GateOptions, leave_out=("gate_tasks", "task_data", "gate_text"))
def command(
    model: str | None,
    data: tuple[Path, ...],
    heldout: tuple[Path, ...],
    out: Path,
    force: bool,
    gate_tasks: str | None,
    **values: Any,
) -> None:
    """Balance MODEL end to end and prove it.

    Profiles load and importance on calibration text, plans replicas and precision under the byte budget, applies the
    plan, saves the checkpoint, loads it again in a fresh process, compares perplexity and load on held-out text, and
    writes report.html. MODEL is a local directory or a hub id; without it, the bundled demo model and text are used.

    With a bound (--max-accuracy-drop, --max-perplexity-rise) the plan is the most balanced of the Pareto front that is
    measured to keep to it, at the worse end of the paired 95 % interval; the unchanged model if none does. What was
    refused, and why, is in the table, metrics.json and report.html; refused-plan.json is the most balanced of those.
    The most balanced plan is tried first, then plans from the safest on until one is refused, so that trying many does
    not pass one by luck. The bound then takes the place of --quality-weight.

    \b
    Examples:
      equipoise balance --out run
      equipoise balance --preset paper --out run-paper
      equipoise balance --max-perplexity-rise 0.05 --out run-gated
      equipoise balance --max-accuracy-drop 0.5 --gate-tasks piqa,arc_easy --task-data DIR --out run-gated
      equipoise balance allenai/OLMoE-1B-7B-0924 --data calibration.jsonl --budget 1.0 --out run-olmoe
    """
    options = take(BalanceOptions, values)
    plan_options, profile_options = take(PlanOptions, values), take(ProfileOptions, values)
    names = tuple(name.strip() for name in (gate_tasks or "").split(",") if name.strip())
    if gate_tasks is not None and not names:
        raise InputError("--gate-tasks names no task")
    gate_options = take(GateOptions, values | {"gate_tasks": names})
    with console.progress() as track:
        result = balance(
            model,
            out,
            data=data,
            heldout=heldout,
            options=options,
            profile_options=profile_options,
            plan_options=plan_options,
            gate_options=gate_options,
            force=force,
            track=track,
        )
    show(result)
    console.note(f"report: {out / 'report.html'}")
    line = result.metrics.summary.model_dump()
    if result.metrics.gate is not None:
        line["gate"] = result.metrics.gate.brief()
    console.last_line(line)


def show(result: BalanceResult) -> None:
    """The tables for people."""
    summary = result.metrics.summary
    if result.metrics.gate is not None:
        show_gate(result.metrics.gate)
    console.table(
        "Balance and memory by layer (LIS on held-out text: 1 is perfect; MiB of expert tensors)",
        ("layer", "LIS before", "LIS after", "MiB before", "MiB after", "replicas", "quantized", "tokens on low slots"),
        [
            (
                layer.layer,
                f"{layer.lis_before:.3f}",
                f"{layer.lis_after:.3f}",
                f"{layer.bytes_before / 2**20:.2f}",
                f"{layer.bytes_after / 2**20:.2f}",
                layer.replicas,
                layer.quantized,
                f"{layer.tokens_quantized:.1%}",
            )
            for layer in result.metrics.layers
        ],
        (
            "all",
            f"{summary.lis_before:.3f}",
            f"{summary.lis_after:.3f}",
            f"{summary.bytes_before / 2**20:.2f}",
            f"{summary.bytes_after / 2**20:.2f}",
            summary.replicas,
            summary.quantized,
            f"{summary.tokens_quantized:.1%}",
        ),
    )
    console.table(
        "Perplexity on held-out text (paired 95 % interval of the change)",
        ("domain", "before", "after", "change %", "95 % interval %", "tokens"),
        [
            (
                row.domain,
                f"{row.before:.3f}",
                f"{row.after:.3f}",
                f"{row.delta_pct:+.3f}",
                "one window" if row.ci95 is None else f"{row.ci95[0]:+.3f} to {row.ci95[1]:+.3f}",
                f"{row.tokens:,}",
            )
            for row in result.metrics.perplexity
        ],
    )


def show_gate(gate: Gate) -> None:
    """The plans of the front, what was measured of them, and why each was accepted or refused."""
    bounds = (("accuracy", gate.bounds.max_accuracy_drop), ("perplexity", gate.bounds.max_perplexity_rise))
    shown = [(name, bound) for name, bound in bounds if bound is not None]
    allowed = " and ".join(f"{name} {UNITS[name][0]} {bound:g} {UNITS[name][1]}" for name, bound in shown)
    columns = ["plan", "LIS predicted", "quality loss"]
    for name, _ in shown:
        columns += [f"{name} {UNITS[name][0]} ({UNITS[name][1]})", "95 % interval"]
    on = " and ".join(f"{count:,} {what}" for what, count in gate.items.items())
    console.table(
        f"Gate: {allowed} allowed at the worse end of the interval; {gate.tried} plans tried on {on}",
        (*columns, "gate"),
        [
            (*_front_row(number, entry, [name for name, _ in shown]), entry.state)
            for number, entry in enumerate(gate.front, 1)
        ],
    )
    for number, entry in enumerate(gate.front, 1):
        if entry.state in ("refused", "accepted"):
            what = "unchanged model" if entry.unchanged else f"plan {number}"
            console.out.print(f"  {what} {entry.state}: {entry.reason}", markup=False)
    console.out.print()


def _front_row(number: int, entry: FrontEntry, names: list[str]) -> list[str]:
    """Predicted and measured figures of a plan; loss above 0 is worse."""
    cells = ["unchanged" if entry.unchanged else str(number), f"{entry.lis:.3f}", f"{entry.quality_loss:.4f}"]
    found = {one.measure: one for one in entry.measured}
    for name in names:
        one = found.get(name)  # type: ignore[call-overload]
        digits = 2 if name == "accuracy" else 3
        cells += ["", ""] if one is None else [
            plain(one.loss, digits), f"{plain(one.ci95[0], digits)} to {plain(one.ci95[1], digits)}"
        ]  # fmt: skip
    return cells
