"""`report.html`: one self-contained page that shows what a run did, with every number behind every picture.

The page asks the network for nothing (its content security policy forbids it), needs no script to be read (one
button copies a table), follows the light or dark setting of the reader, and the same run gives the same bytes.

Cost: about three seconds and 0.3 MB for 4 layers of 16 experts; the table of experts and the points of the
scatter grow with L * E, the pictures' other parts do not.
"""

from __future__ import annotations

from pathlib import Path

import jinja2
from markupsafe import Markup

from equipoise.errors import InputError
from equipoise.files.atomic import atomic_file
from equipoise.reporting import tables
from equipoise.reporting.figures import Figures, figures_of
from equipoise.reporting.headline import gate_headline, headline, tiles
from equipoise.reporting.pictures_gate import gate_picture
from equipoise.reporting.pictures_load import MOST_LINES, gap_picture, heat_map, lis_by_layer
from equipoise.reporting.pictures_quality import bytes_picture, perplexity_picture, scatter, shown_layers
from equipoise.reporting.run_directory import FILES, Run, load_run
from equipoise.reporting.svg import ROLES

NAME = "report.html"


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run directory of `equipoise balance`, whole or not at all.

    Args:
        run_dir: holds `profile.npz`, `plan.json` and `metrics.json`.
        out: the page; None is `report.html` in the run directory. It is replaced if it exists.

    Returns:
        Where the page is.

    Raises:
        InputError: a file of the run is missing, wrong, or of another run; `out` cannot be a page.
    """
    run = load_run(Path(run_dir))
    target = Path(out) if out is not None else run.path / NAME
    if target.is_dir():
        raise InputError(f"{target} is a directory: give the report a file name")
    if target.resolve() in {(run.path / name).resolve() for name in (*FILES, "refused-plan.json")}:
        raise InputError(f"{target} is a file of the run itself: give the report another name")
    page = render(run)
    with atomic_file(target) as partial:
        partial.write_text(page, encoding="utf-8")
    return target


def render(run: Run) -> str:
    """The page as text."""
    figures = figures_of(run)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("equipoise", "reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assert environment.loader is not None
    style, _, _ = environment.loader.get_source(environment, "report.css")
    every = {
        "lis": tables.lis_table(figures, run.metrics),
        "plan": tables.plan_table(run, figures),
        "experts": tables.expert_table(run, figures),
        "rho": tables.correlation_table(figures),
        "bytes": tables.bytes_table(run),
        "perplexity": tables.perplexity_table(run.metrics),
        "made": tables.made_table(run),
    }
    gate = run.metrics.gate
    if gate is not None:
        every["gate"] = tables.gate_table(gate)
    return environment.get_template("report.html.j2").render(
        roles=ROLES,
        style=Markup(style),
        run=run,
        figures=figures,
        summary=run.metrics.summary,
        headline=headline(run),
        gate=gate,
        gate_headline=gate_headline(gate) if gate is not None else "",
        tiles=tiles(run),
        pictures=_pictures(run, figures),
        scatters=_scatters(run, figures),
        shown=[figures.labels[row] for row in shown_layers(figures.shape[0])],
        word_columns=sorted(set().union(*(table.words for table in every.values()))),
        tables=every,
        most_lines=MOST_LINES,
    )


def _pictures(run: Run, figures: Figures) -> dict[str, Markup]:
    """Picture -> inline SVG; our own markup, its texts escaped by the XML writer."""
    pictures = {
        "heat": heat_map(figures),
        "lis": lis_by_layer(figures),
        "bytes": bytes_picture(run.metrics, run.plan.budget.limit_bytes),
        "perplexity": perplexity_picture(run.metrics.perplexity),
    }
    if figures.shape[1] > 1:  # one expert has no next in rank
        pictures["gap"] = gap_picture(figures)
    if run.metrics.gate is not None:
        pictures["gate"] = gate_picture(run.metrics.gate)
    return {name: Markup(svg) for name, svg in pictures.items()}


def _scatters(run: Run, figures: Figures) -> list[tuple[str, Markup]]:
    """(importance, inline SVG), the importance that ranked the experts of the plan first."""
    used = run.metrics.options.get("importance")
    names = sorted(figures.importance, key=lambda name: (name != used, name))
    return [(name, Markup(scatter(figures, name))) for name in names]
