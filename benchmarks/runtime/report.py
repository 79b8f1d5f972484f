"""What the runtime benchmark shows: tables, the bars it is held to, and a picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from equipoise.cli import console

FLAGS = ("avx512f", "avx512_bf16", "avx_vnni", "avx512_vnni", "amx_bf16", "amx_int8")
"""Instructions that decide which kernels there are."""


def processor() -> dict[str, Any]:
    """Model name, cores, and which of the instructions above the processor has."""
    info = Path("/proc/cpuinfo")
    rows = [line.partition(":")[::2] for line in info.read_text().splitlines()] if info.is_file() else []
    found = {key.strip(): value.strip() for key, value in rows}
    have = found.get("flags", "").split()
    cores = sum(key.strip() == "processor" for key, _ in rows)
    return {"name": found.get("model name", "?"), "cores": cores, "flags": [flag for flag in FLAGS if flag in have]}


def _cell(row: dict[str, Any] | None, key: str = "ratio") -> str:
    if row is None:
        return ""
    if "skipped" in row:
        return "left out"
    return f"{row[key]:.2f} ({row['min']:.2f}-{row['max']:.2f})" if key == "ratio" else f"{row[key]:.2f}"


def block_tables(blocks: list[dict[str, Any]]) -> None:
    """A table for each shape and number of threads: variants down, T across; then the errors."""
    for block in blocks:
        times = block["times"]
        first = next(iter(times.values()))
        console.table(
            f"Block {block['shape']}, {block['threads']} thread(s), LIS {block['lis']:.2f}: speed against the best of "
            "transformers, median (least-most) of rounds; last column relative error",
            ("", *(f"T = {t}" for t in times), "error"),
            [
                (
                    name,
                    *(_cell(times[t].get(name)) for t in times),
                    f"{block['errors'][name]:.4f}" if name in block["errors"] else "",
                )
                for name in first
            ],
        )


def whole_tables(wholes: list[dict[str, Any]]) -> None:
    """A table for each model and number of threads: speed against transformers' default, and what `watch` costs."""
    for whole in wholes:
        times = whole["times"]
        if times:
            console.table(
                f"Model {whole['model']}, {whole['threads']} thread(s): speed against untouched by its default, median "
                "(least-most) of rounds; in brackets against the best of transformers' three",
                ("", *times),
                [
                    (name, *(_whole_cell(times[work].get(name)) for work in times))
                    for name in dict.fromkeys(name for rows in times.values() for name in rows)
                ],
            )
        if whole["watch"]:
            console.table(
                f"Model {whole['model']}, {whole['threads']} thread(s): what `watch` adds to the time, median of pairs",
                ("", *next(iter(whole["watch"].values()))),
                [
                    (
                        name,
                        *(_cost(cost) for cost in row.values()),
                    )
                    for name, row in whole["watch"].items()
                ],
            )


def _cost(cost: dict[str, float]) -> str:
    return f"{cost['cost']:+.1%} ({cost['min']:+.1%} to {cost['max']:+.1%})"


def _whole_cell(row: dict[str, Any] | None) -> str:
    cell = _cell(row)
    return f"{cell} [{row['ratio_best']:.2f}]" if row and "ratio_best" in row else cell


def loading_tables(loadings: list[dict[str, Any]]) -> None:
    """Seconds to apply and load, and memory."""
    for loading in loadings:
        console.table(
            f"Model {loading['model']}, {loading['threads']} thread(s): apply in memory, load in a fresh process",
            (
                "",
                "apply s",
                "load s",
                "first forward s",
                "MB stated",
                "MB loaded",
                "MB used",
                "memory ratio",
            ),
            [
                (
                    name,
                    f"{row['apply_seconds']:.2f}" if "apply_seconds" in row else "",
                    f"{row['load_seconds']:.2f}",
                    f"{row['first_forward_seconds']:.2f}",
                    *(f"{row[key] / 1e6:,.0f}" for key in ("bytes", "loaded_VmRSS", "used_VmRSS")),
                    f"{row['memory_ratio']:.3f}",
                )
                for name, row in loading["loading"].items()
            ],
        )


Measured = tuple[str, float]
"""Where it was measured, and what."""


def bars(blocks: list[dict[str, Any]], wholes: list[dict[str, Any]], loadings: list[dict[str, Any]]) -> dict[str, Any]:
    """Each bar with its worst figure, where that was, and whether it is met (null where nothing was measured)."""

    def block(variant: str, large: bool, threads: int | None, rows: Iterable[str] | None = None) -> list[Measured]:
        return [
            (f"{b['shape']} T={t} threads={b['threads']}", times[variant]["ratio"])
            for b in blocks
            if (not large or b["shape"] in ("e64", "e8")) and threads in (None, b["threads"])
            for t, times in b["times"].items()
            if variant in times and (rows is None or t in rows)
        ]

    def whole(variant: str) -> list[Measured]:
        return [
            (f"{w['model']} {work} threads={w['threads']}", rows[variant]["ratio"])
            for w in wholes
            for work, rows in w["times"].items()
            if variant in rows
        ]

    watch = [
        (f"{name} {work} threads={w['threads']}", cost["cost"])
        for w in wholes
        if w["model"] != "demo"
        for name, row in w["watch"].items()
        for work, cost in row.items()
    ]
    memory = [
        (f"{one['model']} {name}", row["memory_ratio"])
        for one in loadings
        if one["model"] != "demo"
        for name, row in one["loading"].items()
        if name != "untouched"
    ]
    return {
        "block, all int8, 1 thread, T >= 8": _least(block("int8", True, 1, ("8", "64", "512")), 1.6),
        "block, all int8, 1 thread, T = 1": _least(block("int8", True, 1, ("1",)), 1.5),
        "block, 25 % int8 and replicas": _least(block("int8_25", False, None), 1.0),
        "block, no plan": _least(block("no_plan", False, None), 1.0),
        "block, 16-bit slots": _least(block("bf16", False, None), 1.0),
        "model, balanced": _least(whole("balanced"), 1.0),
        "model, all int8": _least(whole("int8"), 1.3),
        "watch": _most(watch, 0.03),
        "memory": _most(memory, 1.05),
    }


def _least(figures: list[Measured], bar: float) -> dict[str, Any]:
    where, worst = min(figures, key=lambda f: f[1], default=(None, None))
    return {"at_least": bar, "worst": worst, "where": where, "met": None if worst is None else worst >= bar}


def _most(figures: list[Measured], bar: float) -> dict[str, Any]:
    where, worst = max(figures, key=lambda f: f[1], default=(None, None))
    return {"at_most": bar, "worst": worst, "where": where, "met": None if worst is None else worst <= bar}


def bar_table(found: dict[str, Any]) -> None:
    """The bars."""
    said = {True: "yes", False: "NO", None: "not measured"}
    console.table(
        "Bars (the worst figure of each)",
        ("", "bar", "worst", "met", "where"),
        [
            (
                name,
                f">= {row['at_least']:g}" if "at_least" in row else f"<= {row['at_most']:g}",
                "" if row["worst"] is None else f"{row['worst']:.3f}",
                said[row["met"]],
                row["where"] or "",
            )
            for name, row in found.items()
        ],
    )


def draw_blocks(blocks: list[dict[str, Any]], path: Path) -> None:
    """Speed of each variant by T: a panel for each shape and number of threads; the line at 1 is the best baseline."""
    shapes = list(dict.fromkeys(b["shape"] for b in blocks))
    threads = sorted({b["threads"] for b in blocks})
    figure = Figure(figsize=(4.4 * len(shapes), 0.4 + 3 * len(threads)), dpi=110, layout="constrained")
    axes = figure.subplots(len(threads), len(shapes), squeeze=False)
    # Of all panels: a variant that one of them left out must not move the colours of the others.
    names = list(dict.fromkeys(name for b in blocks for rows in b["times"].values() for name in rows))
    for block in blocks:
        axis = axes[threads.index(block["threads"])][shapes.index(block["shape"])]
        times = block["times"]
        for i, name in enumerate(names):
            points = [(at, times[t][name]["ratio"]) for at, t in enumerate(times) if "ratio" in times[t].get(name, {})]
            width = 0.8 / len(names)
            left = [at + (i + 0.5) * width - 0.4 for at, _ in points]
            axis.bar(left, [r for _, r in points], width, label=name, color=f"C{i}")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(times)), [f"T = {t}" for t in times])
        axis.set_title(f"{block['shape']}, {block['threads']} thread(s)", fontsize=10)
    for row in axes:
        row[0].set_ylabel("speed / best of transformers")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path)
