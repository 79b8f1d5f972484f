"""`equipoise report`: write report.html of a run directory."""

from __future__ import annotations

from pathlib import Path

import click

from equipoise.cli import console
from equipoise.files import require_destination


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path), metavar="RUN_DIR")
@click.option(
    "--out", type=click.Path(path_type=Path), help="File to write.  [default: report.html in RUN_DIR, replaced]"
)
@click.option("--force", is_flag=True, help="Replace the file given by --out if it exists.")
def command(run_dir: Path, out: Path | None, force: bool) -> None:
    """Write report.html of a run directory of `equipoise balance`: one page, no network.

    Reads profile.npz, plan.json and metrics.json of RUN_DIR. The page shows load, LIS, memory and perplexity
    before and after, with every number behind every picture in tables that can be copied.

    \b
    Example:
      equipoise balance --out run
      equipoise report run --out balance-report.html
    """
    from equipoise.reporting.document import write_report
    from equipoise.reporting.run_directory import load_run

    if out is not None:
        require_destination(out, force)
    with console.progress() as track:
        (page,) = [write_report(path, out) for path in track([run_dir], 1, "report")]
    run = load_run(run_dir)
    summary = run.metrics.summary
    layers, experts = run.profile.counts.shape
    console.table(
        f"{page}: {run.plan.model.name or 'model'}, {layers} layers x {experts} experts",
        ("", "before", "after"),
        [
            ("LIS, held out, mean over layers", f"{summary.lis_before:.4f}", f"{summary.lis_after:.4f}"),
            ("bytes of the routed experts", f"{summary.bytes_before:,}", f"{summary.bytes_after:,}"),
            ("perplexity, held out", f"{summary.ppl_before:.4f}", f"{summary.ppl_after:.4f}"),
        ],
    )
    console.last_line(
        {
            "out": str(page),
            "size": page.stat().st_size,
            "layers": layers,
            "experts": experts,
            "lis_before": summary.lis_before,
            "lis_after": summary.lis_after,
            "bytes_before": summary.bytes_before,
            "bytes_after": summary.bytes_after,
            "ppl_before": summary.ppl_before,
            "ppl_after": summary.ppl_after,
            "ppl_delta_ci95": summary.ppl_delta_ci95,
        }
    )
