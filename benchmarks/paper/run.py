"""Every table and figure of the R&Q paper on the reference model and on real traces, written to docs/results.md.

    python benchmarks/reference_moe/build.py --out reference-moe
    python benchmarks/paper/run.py --moe reference-moe --data ../shared/data --traces ../shared/traces --work paper-run

A run that was stopped goes on where it stood: every cell is kept in --work under the hash of what it depends on.
`--quick` is the small form (few documents, wide intervals, another output by default). `--only` measures some
sections, or some of table 2's and generation's cells (`--only lis accuracy/joint domains`); what is kept already still
enters the document, and what is not says so. Several runs with other sections may share a directory, and one GPU.
`--render` measures nothing: with the options of the runs that measured, it writes the document on any machine. The last
stdout line is one JSON object; exit code 1 when a cell could not be run.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # the harness draws a bar for each of MMLU's 57 subjects

import ablation
import batches
import counted
import document
import domains
import expert_changes
import expert_predictors
import gaps
import generation
import headline
import importance_truth
import prompts
import rank_agreement
import samples
import speed
import streams
import switch_table
import table2
import torch
import traces
from cells import Store
from sections import PICTURES, Section
from subject import Subject

from equipoise.cli import console
from equipoise.errors import InputError
from equipoise.pipeline.versions import made_with


@dataclass(frozen=True)
class Part:
    """A section of the document.

    Attributes:
        module: has `section`.
        measure: gives its values.
        inputs: what they depend on, beside the model and its calibration.
        code: modules that measure, beside `module`.
        cells: beginnings of the names of its cells, where it is made of cells of its own.
    """

    module: Any
    measure: Callable[[], Any]
    inputs: dict[str, Any] = field(default_factory=dict)
    code: tuple[ModuleType, ...] = ()
    cells: tuple[str, ...] = ()

    def is_asked(self, name: str, only: Sequence[str]) -> bool:
        """Whether some cell of the section is among those to measure; `name` is the section's."""
        return not only or any(one.split("/")[0] in (self.cells or (name,)) for one in only)


def parts(subject: Subject, trace_files: Path, work: Path) -> dict[str, Part]:
    """Every section by name, in the order of the document."""
    size = {"quick": subject.quick, "share": subject.share}
    beside = {"device": subject.device.type, "large": subject.large}
    files = {"files": sorted(path.name for path in trace_files.glob("*.npz")), "quick": subject.quick}
    truth = (expert_changes, expert_predictors, rank_agreement)

    def part(module: Any, *code: ModuleType) -> Part:
        return Part(module, lambda: module.measure(subject), size, (prompts, *code))

    return {
        "table2": Part(table2, lambda: table2.measure(subject), cells=("lis", "accuracy")),
        "domains": part(domains),
        "speed": Part(speed, lambda: speed.measure(subject), size | beside, (prompts,)),
        "batches": part(batches),
        "importance": part(importance_truth, *truth),
        "samples": part(samples, counted),
        "ablation": part(ablation, counted),
        "gaps": part(gaps),
        "streams": part(streams),
        "generation": Part(generation, lambda: generation.measure(subject), cells=("generation",)),
        "traces": Part(traces, lambda: traces.measure(trace_files, subject.quick), files),
        "switch": Part(switch_table, lambda: switch_table.measure(subject.data, work / "switch", subject.quick), size),
    }


def selected(names: Sequence[str], known: Mapping[str, Part]) -> tuple[str, ...]:
    """Cells to measure, from sections and from beginnings of cell names such as `lis/joint`.

    Raises:
        InputError: a name is neither.
    """
    out: list[str] = []
    for name in names:
        if name in known:
            out += known[name].cells or (name,)
        elif any(name.split("/")[0] in part.cells for part in known.values()):
            out.append(name)
        else:
            raise InputError(f"--only: no section {name!r}; there are {', '.join(known)}")
    return tuple(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moe", type=Path, required=True, help="checkpoint of the reference model")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="benchmark files and text")
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"), help="published routing traces")
    parser.add_argument("--work", type=Path, required=True, help="keeps every cell; a stopped run goes on from it")
    parser.add_argument("--out", type=Path, help="the document (docs/results.md; with --quick, results.md in --work)")
    parser.add_argument("--quick", action="store_true", help="few documents: minutes instead of an hour")
    parser.add_argument("--large", action="store_true", help="13,000 documents for accuracy: for a GPU")
    parser.add_argument("--share", type=float, default=1.0, help="of the full form's documents, for slow machines")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="measure these sections only")
    parser.add_argument("--no-document", action="store_true", help="measure only: beside other runs of --work")
    parser.add_argument("--fresh", action="store_true", help="measure anew what is kept")
    parser.add_argument("--render", action="store_true", help="measure nothing, write what is kept")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="to compute on (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), help="to compute in (default: the fastest)")
    parser.add_argument("--threads", type=int, default=0, help="of torch (0: as torch chooses)")
    arguments = parser.parse_args()
    for directory, what in ((arguments.data, "data"), (arguments.traces, "traces")):
        if not directory.is_dir():
            raise InputError(f"--{what}: {directory} is not a directory; give the one that holds the {what}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    if not 0 < arguments.share <= 1:
        raise InputError(f"--share is in (0, 1], got {arguments.share}")
    if arguments.device == "cuda" and not arguments.render and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; with --render none is needed")
    store = Store(arguments.work, arguments.fresh)
    store.closed = arguments.render
    subject = Subject(
        arguments.moe, arguments.data, store, arguments.quick, arguments.dtype, arguments.share, arguments.large,
        arguments.device,
    )  # fmt: skip
    if not arguments.render:
        store.machine = speed.machine(subject.device.type)
    known = parts(subject, arguments.traces, arguments.work)
    store.only = selected(arguments.only or (), known)
    out = arguments.out or (arguments.work / "results.md" if arguments.quick else Path("docs/results.md"))
    asked = [name for name, part in known.items() if not arguments.no_document or part.is_asked(name, store.only)]
    values = {name: _value(name, known[name], subject) for name in asked}
    if not arguments.no_document:
        folder = out.parent / PICTURES
        folder.mkdir(parents=True, exist_ok=True)
        chapters = [headline.section(values)]
        for name, part in known.items():
            if values[name] is None:
                why = store.failed.get(name, "not measured in this run")
                chapters.append(Section(name.capitalize(), f"Not run: {why}."))
            else:
                chapters.append(part.module.section(values[name], folder, arguments.quick))
        document.write(out, chapters, _command(arguments), _about(arguments, subject, store), store.failed)
        console.note(f"written: {out}, pictures in {folder}")
    console.last_line(
        {
            "out": None if arguments.no_document else str(out),
            "cells_measured": store.measured,
            "cells_kept": store.read,
            "failed": store.failed,
            "seconds": time.perf_counter() - began,
            "measured_seconds": store.seconds,
            "bars": None if arguments.no_document else headline.bars(values),
            **made_with(),
        }
    )
    return 1 if store.failed else 0


def _value(name: str, part: Part, subject: Subject) -> Any:
    """What a section's text is written from; None where it is not kept."""
    if part.cells:
        return part.measure()
    return subject.store.cell(name, subject.inputs(**part.inputs), part.measure, [part.module, *part.code])


def _command(arguments: argparse.Namespace) -> str:
    where = "--moe reference-moe --data ../shared/data --traces ../shared/traces --work paper-run"
    line = f"python benchmarks/paper/run.py {where}"
    line += " --large" if arguments.large and not arguments.quick else ""
    for name in ("device", "dtype"):
        line += f" --{name} {getattr(arguments, name)}" if getattr(arguments, name) else ""
    return line + (" --quick" if arguments.quick else f" --share {arguments.share:g}" if arguments.share < 1 else "")


def _about(arguments: argparse.Namespace, subject: Subject, store: Store) -> str:
    size = "the large form" if arguments.large else "the full form"
    size = size if arguments.share == 1 else f"{arguments.share:.0%} of {size}'s documents"
    machines = "; ".join(f"{seconds / 60:.0f} minutes on {where}" for where, seconds in sorted(store.machines.items()))
    size = "the quick form: few documents, wide intervals" if arguments.quick else size
    return (
        f"Run of {datetime.date.today().isoformat()}, {size}; equipoise {made_with()['equipoise']}; computed in "
        f"{subject.dtype.replace('auto', 'the dtype of the checkpoint')}; its cells took "
        f"{store.seconds / 60:.0f} minutes together: {machines or 'none is kept'}. Weights: {subject.identity}."
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
