"""docs/results.md: written whole from the values of all cells, with the pictures beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sections import Section

from equipoise.files.atomic import atomic_file

HEAD = """\
# Results

Every number and picture here was written by

```
{command}
```

which goes on where it was stopped, and may have been stopped.

{about}

Model: the reference mixture of `benchmarks/reference_moe`. Protocol: the first tenth of every task's prompts
calibrates, the rest is scored; LIS at batch 1 with one new token; accuracy by lm-evaluation-harness; intervals are
95 %, paired on the same documents or windows. LIS is of slots where there are replicas, so it can fall below 1.
Results that go against the paper or against this project stay in.
"""


def write(path: Path, sections: Sequence[Section], command: str, about: str, failed: Mapping[str, str]) -> None:
    """Write the document.

    Args:
        path: results.md.
        sections: in order.
        command: that wrote it.
        about: a paragraph on the run: date, machine, versions, size.
        failed: cells that could not be run, and why.
    """
    parts = [HEAD.format(command=command, about=about)]
    parts += [f"## {section.title}\n\n{section.text.strip()}\n" for section in sections]
    if failed:
        lines = "\n".join(f"- `{name}`: {why}" for name, why in sorted(failed.items()))
        parts.append(f"## What could not be run\n\n{lines}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_text("\n".join(parts), encoding="utf-8")
