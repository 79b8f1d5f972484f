"""`equipoise stream`: replay a stream of load with the balancer's policies, from a model that runs or from traces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from equipoise.cli import console
from equipoise.cli.dataclass_options import options_of, take
from equipoise.errors import InputError
from equipoise.streaming.options import AdaptiveOptions, TextOptions

if TYPE_CHECKING:
    from rich.table import Table

    from equipoise.streaming import Replay, Step
    from equipoise.types import FloatArray, IntArray


@click.command(name="stream")
@click.argument("model", required=False)
@click.option(
    "--data",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Text that MODEL runs on, in order: .jsonl(.gz) of texts or of multiple-choice questions, or .txt.",
)
@click.option(
    "--adversarial",
    is_flag=True,
    help="The documents of --data that hit MODEL's heavy hitters most, in ten time steps, instead of all the text.",
)
@click.option(
    "--trace",
    "traces",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE.npz",
    help="Routing trace or profile instead of MODEL; give it several times to join traces of one model, in order.",
)
@click.option("--window", type=int, metavar="W", help="Tokens a step; padding is none.  [default: 512]")
@click.option("--replicas", type=int, metavar="R", help="Spare slots of each layer.  [default: a quarter of E]")
@click.option(
    "--policies", "--policy", "policies", metavar="A,B", help="Which policies, separated by commas.  [default: all]"
)
@click.option(
    "--follow-share",
    type=float,
    default=AdaptiveOptions.follow_share,
    show_default=True,
    metavar="S",
    help="adaptive: over the stream, move at most this share of what short would have moved.",
)
@click.option("--move-bytes", type=int, metavar="N", help="adaptive: move at most so many bytes a step.")
@click.option(
    "--expert-bytes", type=int, metavar="N", help="Bytes of one expert, for traces that carry no sizes.  [default: 1]"
)
@options_of(TextOptions)
@click.option("--out", type=click.Path(path_type=Path), help="Write every step here (.json), and a picture beside it.")
@click.option("--force", is_flag=True, help="Replace --out if it exists.")
@click.pass_context
def command(
    ctx: click.Context,
    model: str | None,
    data: tuple[Path, ...],
    adversarial: bool,
    traces: tuple[Path, ...],
    window: int | None,
    replicas: int | None,
    policies: str | None,
    follow_share: float,
    move_bytes: int | None,
    expert_bytes: int | None,
    out: Path | None,
    force: bool,
    **values: Any,
) -> None:
    """Replay the load of MODEL on a text, or of traces, as a stream: replicas are decided again at each step.

    Policies: raw (no replicas), static (the first window's, kept), long and short (the paper's option 1, all earlier
    windows, and option 2, the last one), adaptive (forecast from many horizons, moves that pay), oracle (knows the
    step; the bound). LIS is the mean over layers and steps, 1 is perfect balance. The first window only places.
    Moved are slots whose expert changed. MODEL is a local directory, a hub id, or `demo` (the bundled model, whose
    text is the default --data); it is run as it is, and its replicas are reckoned.

    \b
    Examples:
      equipoise stream demo --by-domain --max-tokens 20000
      equipoise stream demo --adversarial --sequences 100 --policy long,short,adaptive
      equipoise profile demo --out demo.npz
      equipoise stream --trace demo.npz --replicas 4 --out results.json
    """
    from equipoise.files.atomic import atomic_file, require_destination
    from equipoise.streaming import POLICIES, Replay, follow
    from equipoise.streaming.picture import draw

    given = {name for name in ctx.params if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    _check_source(model, traces, adversarial, given)
    adaptive = AdaptiveOptions(follow_share=follow_share, move_bytes=move_bytes)
    text = take(TextOptions, values)
    names = POLICIES if policies is None else tuple(dict.fromkeys(n.strip() for n in policies.split(",")))
    picture = None
    if out is not None:
        if out.suffix != ".json":
            raise InputError(f"--out {out} must end in .json: the picture is written beside it as .png")
        picture = out.with_suffix(".png")
        for path in (out, picture):
            require_destination(path, force, [*traces, *data])
    follow([], replicas or 0, names, adaptive)  # wrong names and numbers are refused before a model is loaded
    if model is None:
        source = _of_traces(traces, window, expert_bytes)
    elif adversarial:
        source = _of_adversarial(model, data, text)
    else:
        source = _of_text(model, data, 512 if window is None else window, text)
    replicas = max(1, source.experts // 4) if replicas is None else replicas
    result = Replay(names)
    _run(result, follow(source.windows, replicas, names, adaptive, source.sizes), source.count - 1)
    lis, moves, moved = result.lis(), result.moves(), result.moved_bytes()
    title = f"{source.title}, {replicas} replicas a layer"
    console.table(
        f"{title}: mean of {len(result.steps)} steps" + (f" of {source.tokens} tokens" if source.tokens else ""),
        ("policy", "LIS", "slots moved", "bytes moved" if source.sizes is not None else "bytes moved (1 a slot)"),
        [(name, f"{lis[name]:.3f}", f"{moves[name]:,}", f"{moved[name]:,}") for name in names],
    )
    summary = {**result.summary(), **source.facts}
    if out is not None and picture is not None:
        document = {
            **summary,
            "traces": [str(t) for t in traces],
            "window": source.tokens,
            "replicas": replicas,
            "starts": [list(pair) for pair in source.names],
            "by_step": [
                {"step": s.number, "lis": s.lis, "moves": s.moves, "moved_bytes": s.moved_bytes} for s in result.steps
            ],
        }
        with atomic_file(out) as partial:
            partial.write_text(json.dumps(console.plain(document), indent=1, allow_nan=False) + "\n")
        draw(result, picture, title, source.names)
        summary |= {"out": str(out), "picture": str(picture)}
    console.last_line(summary)


@dataclass
class _Source:
    """What is replayed: windows that may still be made, how many, and what to call them."""

    windows: Iterator[FloatArray]
    count: int
    experts: int
    title: str
    names: tuple[tuple[int, str], ...]
    tokens: int = 0
    sizes: IntArray | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def _check_source(model: str | None, traces: tuple[Path, ...], adversarial: bool, given: set[str]) -> None:
    """Refuse options that say nothing about the source that was chosen."""
    if (model is None) == (not traces):
        raise InputError("give what to replay: a MODEL to run on --data, or traces with --trace FILE.npz, not both")
    every = {"seq_len", "batch_size", "max_tokens", "by_domain", "sequences", "keep", "data", "adversarial"}
    if model is None:
        idle, why = every, "runs a MODEL on text; with --trace leave it out"
    elif adversarial:
        idle, why = {"max_tokens", "by_domain", "window", "expert_bytes"}, "is not for --adversarial, whose steps are "
        why += "whole documents of MODEL"
    else:
        idle, why = {"sequences", "keep"}, "is for --adversarial: add it, or leave this out"
        if "expert_bytes" in given:
            raise InputError("expert-bytes is for traces that carry no sizes; a MODEL has them: leave it out")
    wrong = sorted(idle & given)
    if wrong:
        raise InputError(f"{wrong[0].replace('_', '-')} {why}")


def _of_traces(traces: tuple[Path, ...], window: int | None, expert_bytes: int | None) -> _Source:
    import numpy as np

    from equipoise.streaming import load_stream
    from equipoise.streaming.replay import check_parts

    stream = load_stream(traces, window)
    check_parts(stream.parts)
    sizes = stream.slot_bytes
    if expert_bytes is not None:
        if sizes is not None:
            raise InputError("expert-bytes is for traces that carry no sizes; this one has them: leave it out")
        if not 1 <= expert_bytes <= 2**40:
            raise InputError(f"expert-bytes must be from 1 to a tebibyte, got {expert_bytes}")
        sizes = np.full(stream.parts.shape[2:], expert_bytes, dtype=np.int64)
    title = " + ".join(name for _, name in stream.names)
    count, experts = len(stream.parts), stream.parts.shape[-1]
    return _Source(iter(stream.parts), count, experts, title, stream.names, stream.window, sizes)


def _of_text(model: str, data: tuple[Path, ...], window: int, options: TextOptions) -> _Source:
    from equipoise.pipeline.stream_text import text_stream
    from equipoise.streaming import read_documents

    files = _files(model, data)
    records = read_documents(files, options.by_domain)
    loaded = _load(model)
    stream = text_stream(loaded.model, loaded.tokenizer, records, window, options)
    title = f"{model} on {', '.join(path.name for path in files)}"
    facts = {"model": model, "window": window, "tokens": stream.count * window}
    experts = stream.slot_bytes.shape[1]
    return _Source(stream.windows, stream.count, experts, title, stream.names, window, stream.slot_bytes, facts)


def _of_adversarial(model: str, data: tuple[Path, ...], options: TextOptions) -> _Source:
    from equipoise.pipeline.stream_text import adversarial_text
    from equipoise.streaming import read_documents

    files = _files(model, data)
    records = read_documents(files, by_domain=True)
    loaded = _load(model)
    with console.progress() as track:
        stream, chosen, counts = adversarial_text(loaded.model, loaded.tokenizer, records, options, track)
    title = f"{model} on {', '.join(path.name for path in files)}, {len(chosen.kept)} adversarial documents"
    facts = {
        "model": model,
        "documents": len(counts),
        "kept": len(chosen.kept),
        "hit_share": float(chosen.hit[chosen.kept].mean()),
        "hit_share_all": float(chosen.hit.mean()),
        "selections": int(counts[chosen.kept].sum()),
    }
    parts = stream.parts
    return _Source(iter(parts), len(parts), parts.shape[-1], title, stream.names, 0, stream.slot_bytes, facts)


def _files(model: str, data: tuple[Path, ...]) -> tuple[Path, ...]:
    """The files to read; the demo model has text of its own."""
    from equipoise.demo import calibration_text
    from equipoise.models.loading import DEMO

    if data:
        return data
    if model != DEMO:
        raise InputError("no text: give --data FILE (.jsonl, .jsonl.gz with a text field, or .txt)")
    return (calibration_text(),)


def _load(model: str) -> Any:
    """The model, refused before its weights are read where it has no experts to balance."""
    from equipoise.models.loading import empty_model, find_source, load_model

    source = find_source(model)
    if not source.is_balanced:
        empty_model(source)
    return load_model(source.name)


def _run(result: Replay, steps: Iterator[Step], total: int) -> None:
    """Run the replay: a live table where stdout is a terminal, a bar on stderr elsewhere."""
    from rich.live import Live

    if not console.out.is_terminal:
        with console.progress() as track:
            result.steps.extend(track(steps, total, "steps"))
        return
    with Live(console=console.out, refresh_per_second=8, transient=True) as live:
        for step in steps:
            result.steps.append(step)
            live.update(_table(result, total))


def _table(result: Replay, total: int) -> Table:
    """The live table after the latest step."""
    from rich import box
    from rich.table import Table

    step, means, moves = result.steps[-1], result.lis(), result.moves()
    grid = Table(box=box.SIMPLE_HEAD, title=f"step {step.number} of {total}", title_justify="left")
    grid.add_column("policy")
    for column in ("LIS now", "LIS mean", "moved now", "moved"):
        grid.add_column(column, justify="right")
    for name in result.policies:
        grid.add_row(name, f"{step.lis[name]:.3f}", f"{means[name]:.3f}", f"{step.moves[name]:,}", f"{moves[name]:,}")
    return grid
