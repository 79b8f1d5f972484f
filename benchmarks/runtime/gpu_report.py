"""The Markdown of `gpu.py`: tables of ratios and milliseconds, naming the GPU."""

from __future__ import annotations

from typing import Any


def document(found: dict[str, Any]) -> str:
    """Everything that was measured; ratios above 1 are faster."""
    lines = [
        f"# Runtime on {found['device']}",
        "",
        f"torch {found['torch']}, transformers {found['transformers']}; low precision by kernels: {found['kernels']}. "
        "Speed against the best of transformers' eager, batched_mm and grouped_mm in the same round, median (least to "
        "most), and milliseconds; above 1 is faster.",
        "",
    ]
    for name, block in found["blocks"].items():
        lines += [f"## Block {name}, called layer by layer (8 routings)", "", *_table(block["times"], block["errors"])]
        if block["graph"]:
            lines += [f"## Block {name}, as a CUDA graph (8 routings)", "", *_table(block["graph"], {})]
        for key, why in block["graph_failed"].items():
            lines += [f"Not captured: {key} ({why})", ""]
    if whole := found.get("whole"):
        lines += [
            f"## OLMoE-like model of {whole['bytes'] / 1e9:.2f} GB, mean LIS {whole['lis']:.2f}",
            "",
            "Against transformers' default (grouped_mm).",
            "",
            *_table(whole["times"], {}),
            "| added to the time, median (least to most) | prefill_1x512 | decode_8 |",
            "|---|---|---|",
        ]
        for name, row in (whole["watch"] | whole["laser"]).items():
            cells = (f"{c['cost']:+.1%} ({c['min']:+.1%} to {c['max']:+.1%})" for c in row.values())
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    if found["left_out"]:
        lines += [f"Left out, no time: {'; '.join(found['left_out'])}.", ""]
    return "\n".join(lines)


def _table(times: dict[str, Any], errors: dict[str, float]) -> list[str]:
    """Variants down, works across."""
    if not times:
        return ["(nothing measured)", ""]
    names = dict.fromkeys(name for rows in times.values() for name in rows)
    error = ["relative error"] if errors else []
    lines = [
        "| | " + " | ".join([*(f"T = {key}" if key.isdigit() else key for key in times), *error]) + " |",
        "|---" * (1 + len(times) + len(error)) + "|",
    ]
    for name in names:
        cells = [_cell(rows.get(name)) for rows in times.values()]
        if errors:
            cells.append(f"{errors[name]:.4f}" if name in errors else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(row: dict[str, Any] | None) -> str:
    return f"{row['ratio']:.2f} ({row['min']:.2f}-{row['max']:.2f}), {row['ms']:.3f} ms" if row else ""
