"""`equipoise stream`: replay a stream of load with the balancer's policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from equipoise.cli import console
from equipoise.streaming.options import AdaptiveOptions

if TYPE_CHECKING:
    from rich.table import Table

    from equipoise.streaming import Replay


@click.command(name="stream")
@click.option(
    "--trace",
    "traces",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    metavar="FILE.npz",
    help="Routing trace or profile; give it several times to join traces of one model, in order.",
)
@click.option("--window", type=int, metavar="W", help="Tokens a step, for traces of per-token ids.  [default: 512]")
@click.option("--replicas", type=int, required=True, metavar="R", help="Spare slots of each layer.")
@click.option("--policies", metavar="A,B", help="Which policies, separated by commas.  [default: all]")
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
@click.option("--out", type=click.Path(path_type=Path), help="Write every step here (.json), and a picture beside it.")
@click.option("--force", is_flag=True, help="Replace --out if it exists.")
def command(
    traces: tuple[Path, ...],
    window: int | None,
    replicas: int,
    policies: str | None,
    follow_share: float,
    move_bytes: int | None,
    expert_bytes: int | None,
    out: Path | None,
    force: bool,
) -> None:
    """Replay traces as a stream: replicas are decided again at each step, from the steps before it.

    Policies: raw (no replicas), static (the first window's, kept), long and short (the paper's option 1, all earlier
    windows, and option 2, the last one), adaptive (forecast from many horizons, moves that pay), oracle (knows the
    step; the bound). LIS is the mean over layers and steps, 1 is perfect balance. The first window only places.
    Moved are slots whose expert changed.

    \b
    Examples:
      equipoise profile demo --out demo.npz
      equipoise stream --trace demo.npz --replicas 4
      equipoise stream --trace demo.npz --replicas 4 --policies short,adaptive --out results.json
    """
    import numpy as np

    from equipoise.errors import InputError
    from equipoise.files.atomic import atomic_file, require_destination
    from equipoise.streaming import POLICIES, Replay, load_stream, replay
    from equipoise.streaming.picture import draw

    options = AdaptiveOptions(follow_share=follow_share, move_bytes=move_bytes)
    names = POLICIES if policies is None else tuple(dict.fromkeys(n.strip() for n in policies.split(",")))
    picture = None
    if out is not None:
        if out.suffix != ".json":
            raise InputError(f"--out {out} must end in .json: the picture is written beside it as .png")
        picture = out.with_suffix(".png")
        for path in (out, picture):
            require_destination(path, force, traces)
    stream = load_stream(traces, window)
    sizes = stream.slot_bytes
    if expert_bytes is not None:
        if sizes is not None:
            raise InputError("expert-bytes is for traces that carry no sizes; this one has them: leave it out")
        if not 1 <= expert_bytes <= 2**40:
            raise InputError(f"expert-bytes must be from 1 to a tebibyte, got {expert_bytes}")
        sizes = np.full(stream.parts.shape[2:], expert_bytes, dtype=np.int64)
    result = Replay(names)
    _run(result, replay(stream.parts, replicas, names, options, sizes),
         len(stream.parts) - 1)  # fmt: skip
    lis, moves, moved = result.lis(), result.moves(), result.moved_bytes()
    title = f"{' + '.join(name for _, name in stream.names)}, {replicas} replicas a layer"
    console.table(
        f"{title}: mean of {len(result.steps)} steps" + (f" of {stream.window} tokens" if stream.window else ""),
        ("policy", "LIS", "slots moved", "bytes moved" if sizes is not None else "bytes moved (1 a slot)"),
        [(name, f"{lis[name]:.3f}", f"{moves[name]:,}", f"{moved[name]:,}") for name in names],
    )
    summary = result.summary()
    if out is not None and picture is not None:
        document = {
            **summary,
            "traces": [str(t) for t in traces],
            "window": stream.window,
            "replicas": replicas,
            "starts": [list(pair) for pair in stream.names],
            "by_step": [
                {"step": s.number, "lis": s.lis, "moves": s.moves, "moved_bytes": s.moved_bytes} for s in result.steps
            ],
        }
        with atomic_file(out) as partial:
            partial.write_text(json.dumps(console.plain(document), indent=1, allow_nan=False) + "\n")
        draw(result, picture, title, stream.names)
        summary |= {"out": str(out), "picture": str(picture)}
    console.last_line(summary)


def _run(result: Replay, steps: object, total: int) -> None:
    """Run the replay: a live table where stdout is a terminal, a bar on stderr elsewhere."""
    from collections.abc import Iterator
    from typing import cast

    from rich.live import Live

    from equipoise.streaming import Step

    iterator = cast("Iterator[Step]", steps)
    if not console.out.is_terminal:
        with console.progress() as track:
            result.steps.extend(track(iterator, total, "steps"))
        return
    with Live(console=console.out, refresh_per_second=8, transient=True) as live:
        for step in iterator:
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
