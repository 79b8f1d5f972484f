"""The planner against DeepSeek's EPLB, a plain greedy, and lower bounds: one command, one run, a table, a JSON line.

    python benchmarks/planner/bench.py --out benchmarks/planner/results
    python benchmarks/planner/bench.py --quick            # every fourth layer, fewer sizes
    python benchmarks/planner/bench.py --only times --out benchmarks/planner/results     # on a quiet machine

What is compared, and how:
  in sample   every planner is given the same total load of the planning part; rank imbalance on that same total
              (ours: `--robust-windows 1 --guard 0`)
  held out    EPLB and greedy as above; ours as the product plans by default (windows of the same part, behind the
              guard: `--robust-windows 16 --guard 2.5 --shares merged`), with `--shares even`, and without the guard
              (`--guard 0`), each with its own shares
              scored on the rest, mean over windows and layers of max over mean of the ranks
  bound       what no even-share layout can beat: 1, or the heaviest expert (`placement.rank_bound`)
  time        CPU seconds (one thread, so wall seconds where nothing else runs) of the call that plans all layers,
              compiled code warm; by itself, the compile time of a fresh process with an empty cache
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from cases import Case, bound, greedy, imbalance, planned_imbalance, traces
from eplb import rebalance
from optimum import joint_gaps
from pictures import draw_redundancy, draw_sizes

from equipoise.cli import console
from equipoise.errors import InputError
from equipoise.options import PlanOptions
from equipoise.planning import plan
from equipoise.planning.guard import baseline, convinced, layers_won, left_out
from equipoise.planning.placement import place_grouped, place_layer, place_total
from equipoise.planning.replicas import replica_counts
from equipoise.planning.robust import effective_load, placement_load, shrink, windows_of
from equipoise.scoring import score
from equipoise.types import Profile

RANKS = (4, 8, 16, 32, 64)
REDUNDANCY = (0.0, 0.125, 0.25)


def ranks_of_trace(case: Case, step: int) -> list[dict]:
    """Every number of ranks and redundancy of one trace."""
    counts, rows = case.plan.counts, []
    layers = range(0, len(counts), step)
    options = PlanOptions()
    windows = windows_of(case.plan, options.robust_windows)[:, ::step]
    experts, seen = counts.shape[1], set()
    for ranks in RANKS:
        for redundancy in REDUNDANCY:
            slots = -(-round(experts * (1 + redundancy)) // ranks) * ranks
            if ranks > experts or (ranks, slots) in seen:
                continue
            seen.add((ranks, slots))
            began = time.perf_counter()
            tables = rebalance(counts[::step], slots, 1, 1, ranks)[0].reshape(len(layers), ranks, -1)
            eplb_time = time.perf_counter() - began
            began = time.perf_counter()
            total = list(place_total(counts[::step], slots, ranks)[0])
            our_time = time.perf_counter() - began
            # What `plan` does on ranks, in its parts, so that variants share them; `product_differs` holds it to that.
            began = time.perf_counter()
            shrunk = [shrink(np.ascontiguousarray(windows[:, i])) for i in range(len(layers))]
            load = [placement_load(rows_) for rows_ in shrunk]
            starts = [replica_counts(effective_load(rows_), slots - experts, ranks) for rows_ in shrunk]
            robust = [place_layer(r, slots, ranks, start=s) for r, s in zip(load, starts, strict=True)]
            robust_time = time.perf_counter() - began
            began = time.perf_counter()
            won, won_even = (convinced(g, options.guard) for g in left_out(windows, np.full(len(layers), slots), ranks))
            guard_time = time.perf_counter() - began
            merged, legal = (
                [baseline(counts[i], r, slots, ranks, merged=m) for i, r in zip(layers, load, strict=True)]
                for m in (True, False)
            )
            guarded = [r if w else b for r, b, w in zip(robust, merged, won, strict=True)]
            even = [r if w else b for r, b, w in zip(robust, legal, won_even, strict=True)]
            dealt = [greedy(counts[i].astype(float), slots, ranks) for i in layers]
            row = {
                "trace": case.name,
                "ranks": ranks,
                "redundancy": redundancy,
                "slots": slots,
                "bound": bound(counts[::step], slots, ranks),
                "layers": len(layers),
                "layers_by_windows": int(won.sum()),
                "layers_eplb_legal": int(sum(np.array_equal(a.table, b) for a, b in zip(legal, tables, strict=True))),
                "layers_merged": int(sum(x.shares is not None and (x.shares == 0).any() for x in guarded)),
                "seconds": {"eplb": eplb_time, "ours": our_time, "robust": robust_time, "guard": guard_time},
            }
            plain = {"greedy": dealt, "eplb": list(tables), "ours": total}
            every = {name: [(table, None) for table in made] for name, made in plain.items()}
            ours = {"legal": legal, "merged": merged, "robust": robust, "guarded": guarded, "guarded_even": even}
            every |= {name: [(x.table, x.shares) for x in made] for name, made in ours.items()}
            for name, layouts in every.items():
                row[f"in_{name}"] = float(
                    np.mean([imbalance(t, counts[i], s) for (t, s), i in zip(layouts, layers, strict=True)])
                )
            if case.held is not None:
                held = case.held.series if case.held.series is not None else case.held.counts[None]
                for name, layouts in every.items():
                    parts = [imbalance(t, held[:, i], s) for (t, s), i in zip(layouts, layers, strict=True)]
                    row[f"out_{name}"] = float(np.mean(parts))
            if case.held is not None and step == 1 and (ranks, redundancy) == CHECKED:
                row["product_differs"] = product_differs(case, row)
            rows.append(row)
    return rows


CHECKED = (8, 0.125)
"""Ranks and redundancy at which every trace is planned by `plan` too."""


def product_differs(case: Case, row: dict) -> float:
    """How far the plan that the product makes by default is from what is called `guarded` here, held out."""
    made = plan(case.plan, ranks=row["ranks"], slots=row["slots"])
    held = case.held.series if case.held.series is not None else case.held.counts[None]
    found = [planned_imbalance(layer, row["ranks"], held[:, i]) for i, layer in enumerate(made.layers)]
    return abs(float(np.mean(found)) - row["out_guarded"])


def experts_of_trace(case: Case) -> dict:
    """E/4 int8 replicas paid for by int8 experts at budget 1.0: LIS reduction, held out, by preset and windows."""
    quarter = max(1, case.plan.num_experts // 4)
    held = case.held or case.plan
    row: dict = {"trace": case.name, "how": case.how, "replicas": quarter}
    for name, options in (
        ("robust", {"replicas": quarter, "budget": 1.0}),
        ("total", {"replicas": quarter, "budget": 1.0, "robust_windows": 1}),
        ("default", {}),
        ("paper", {"preset": "paper", "importance": "frequency"}),
    ):
        made = plan(case.plan, **options)
        found = score(made, held).means()
        row["lis_raw"] = found["lis_raw"]
        row[f"lis_{name}"] = found["lis"]
        row[f"reduction_{name}"] = found["lis_raw"] / found["lis"]
        if name == "robust":
            row["lis_oracle"] = found["lis_oracle"]
        if name == "default":
            row["replicas_default"] = made.num_replicas / len(made.layers)
    return row


def timings(repeats: int = 11) -> dict:
    """58 layers x 256 experts -> 288 slots on 32 ranks; median of runs."""
    load = np.random.default_rng(0).lognormal(size=(58, 256))
    out: dict = {}

    def median(call, times: int) -> float:
        taken = []
        for _ in range(times):
            began = time.process_time()
            call()
            taken.append(time.process_time() - began)
        return float(np.median(taken))

    out["global_ours"] = median(lambda: place_total(load, 288, 32), repeats)
    out["hierarchical_ours"] = median(lambda: place_total(load, 288, 32, nodes=4, groups=8), repeats)
    for name, groups, nodes in (("global", 1, 1), ("hierarchical", 8, 4)):
        out[f"{name}_eplb_plain_numbers"] = median(lambda g=groups, n=nodes: rebalance(load, 288, g, n, 32), 3)
        out[f"{name}_eplb"] = median(lambda g=groups, n=nodes: rebalance(load, 288, g, n, 32, tensors=True), 1)
        out[f"{name}_speedup"] = out[f"{name}_eplb"] / out[f"{name}_ours"]
        out[f"{name}_speedup_plain_numbers"] = out[f"{name}_eplb_plain_numbers"] / out[f"{name}_ours"]
    return out


SERIES = {
    "9 slots a rank": [(32, 8 * g, g, 9 * g) for g in (8, 16, 32, 64, 128, 256, 512)],
    "4 slots a rank": [(32, 2 * g, g, 4 * g) for g in (64, 128, 256, 512)],
    "32 ranks": [(32, 32 * c, 32, 36 * c) for c in (8, 16, 24, 32)],
    "layers": [(layers, 256, 32, 288) for layers in (8, 16, 32, 64, 128)],
    "largest": [(128, 1024, 512, 2048)],
}
"""Sizes along which one thing grows and the shape stays: (layers, experts, ranks, slots)."""


def sizes(quick: bool, repeats: int = 5) -> list[dict]:
    """Seconds a plan along each series, the best of some repeats (what disturbs a run only adds to it)."""
    rng = np.random.default_rng(0)
    rows = []
    for series, grid in SERIES.items():
        for layers, experts, ranks, slots in grid[: 3 if quick else None]:
            load = rng.lognormal(size=(layers, experts))
            taken = []
            for _ in range(repeats):
                began = time.process_time()
                found = place_total(load, slots, ranks)[2]
                taken.append(time.process_time() - began)
            work = layers * slots * np.log2(slots)
            rows.append(
                {"series": series, "layers": layers, "experts": experts, "ranks": ranks, "slots": slots,
                 "seconds": min(taken), "median_seconds": float(np.median(taken)),
                 "ns_per_LSlogS": min(taken) / work * 1e9, "imbalance": float(np.mean(found))}
            )  # fmt: skip
    return rows


def exponents(rows: list[dict]) -> dict:
    """Of each series the fitted e in  seconds ~ (L S log2 S)^e; 1 is linear."""
    out = {}
    for series in {r["series"]: None for r in rows}:
        here = [r for r in rows if r["series"] == series]
        if len(here) > 2:
            work = [r["layers"] * r["slots"] * np.log2(r["slots"]) for r in here]
            out[series] = float(np.polyfit(np.log(work), np.log([r["seconds"] for r in here]), 1)[0])
    return out


def against_eplb(held: list[dict], name: str) -> dict:
    """Held-out imbalance of one planner relative to EPLB's."""
    ratio = np.array([r[f"out_{name}"] / r["out_eplb"] for r in held])
    uneven = np.array([r["out_eplb"] > 1.05 for r in held])
    return {
        "ratio_uneven": float(np.exp(np.log(ratio[uneven]).mean())),
        "worse_by_half_percent": int((ratio > 1.005).sum()),
        "worst": float(ratio.max()),
        "best": float(ratio.min()),
    }


def summary(rows: list[dict]) -> dict:
    """The figures that the bars are about."""
    held = [r for r in rows if "out_eplb" in r]
    names = sorted({r["trace"] for r in held})
    parts = {"all": held}
    for number, half in enumerate(("chosen_on", "other_half")):
        parts[half] = [r for r in held if names.index(r["trace"]) % 2 == number]
    worse = [r for r in rows if r["in_ours"] > r["in_eplb"] * (1 + 1e-9)]
    beyond = [r for r in worse if r["in_ours"] > r["bound"] * 1.001]
    gap_eplb = np.mean([r["in_eplb"] - r["bound"] for r in rows])
    # With even shares an expert may not stand on a rank twice: what it costs to part those.
    against_legal = [r["out_guarded_even"] / r["out_legal"] for r in held]
    return {
        "cases": len(rows),
        "in_sample_worse_than_eplb": len(worse),
        "in_sample_worse_than_eplb_beyond_tolerance": len(beyond),
        "in_sample_gap_eplb": float(gap_eplb),
        "in_sample_gap_ours": float(np.mean([r["in_ours"] - r["bound"] for r in rows])),
        "in_sample_gap_ratio": float(np.mean([r["in_ours"] - r["bound"] for r in rows]) / gap_eplb),
        "in_sample_gap_greedy": float(np.mean([r["in_greedy"] - r["bound"] for r in rows])),
        "held_out_cases": len(held),
        "held_out_uneven_cases": sum(r["out_eplb"] > 1.05 for r in held),
        "held_out": {
            name: {part: against_eplb(some, name) for part, some in parts.items()}
            for name in ("guarded", "guarded_even", "robust", "ours", "merged", "legal")
        },
        "held_out_even_worse_than_legal_eplb_by_half_percent": sum(x > 1.005 for x in against_legal),
        "held_out_even_worst_of_legal_eplb": max(against_legal),
        "product_differs_at_most": max((r["product_differs"] for r in held if "product_differs" in r), default=None),
        "layers_by_windows": sum(r["layers_by_windows"] for r in held) / sum(r["layers"] for r in held),
        "layers_merged": sum(r["layers_merged"] for r in held) / sum(r["layers"] for r in held),
    }


def warm_up() -> None:
    """Compile, or read from the cache, everything that is timed."""
    place_total(np.arange(24.0).reshape(2, 12), 16, 8)
    place_total(np.arange(24.0).reshape(2, 12), 16, 8, nodes=2, groups=4)
    place_layer(np.ones((2, 12)), 14, 4)
    layers_won(np.arange(96.0).reshape(4, 2, 12), np.full(2, 16), 4, 2.5)
    place_grouped(np.arange(12.0), 16, 8, 2, 4)
    plan(Profile(np.arange(1, 25).reshape(2, 12), np.arange(2), {}))


def cold_compile() -> float:
    """Seconds that a fresh process with an empty cache takes to compile (imports not counted)."""
    program = "import time, bench; t = time.perf_counter(); bench.warm_up(); print(time.perf_counter() - t)"
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parent,
            env={**os.environ, "NUMBA_CACHE_DIR": empty},
        )  # fmt: skip
    return float(done.stdout)


def balance(cases: list[Case], step: int) -> tuple[dict, dict]:
    """Everything that no clock measures: the figures, and the rows they come from."""
    hard = np.array([600, 560, 120, 120, 20, 10, 10, 10])
    published = {
        "ours": imbalance(place_layer(hard, 16, 8).table, hard) * hard.sum() / 8,
        "eplb": imbalance(rebalance(hard[None], 16, 1, 1, 8)[0].reshape(8, 2), hard) * hard.sum() / 8,
    }
    rows, expert_rows = [], []
    with console.progress() as track:
        for case in track(cases, len(cases), "traces"):
            rows += ranks_of_trace(case, step)
            expert_rows.append(experts_of_trace(case))
    console.table(
        "Rank imbalance (1 is perfect): in sample on the total planned on (guard 0), held out on the rest",
        ("trace", "ranks", "slots", "bound", "greedy", "EPLB", "ours", "out EPLB", "ours", "ratio", "guard 0", "ratio"),
        [
            (
                r["trace"][:44], r["ranks"], r["slots"], f"{r['bound']:.4f}", f"{r['in_greedy']:.4f}",
                f"{r['in_eplb']:.4f}", f"{r['in_ours']:.4f}",
                *((f"{r['out_eplb']:.4f}", f"{r['out_guarded']:.4f}", f"{r['out_guarded'] / r['out_eplb']:.4f}",
                   f"{r['out_robust']:.4f}", f"{r['out_robust'] / r['out_eplb']:.4f}")
                  if "out_eplb" in r else ("",) * 5),
            )
            for r in rows
        ],
    )  # fmt: skip
    console.table(
        "LIS held out (E/4 int8 replicas paid for by int8 experts; planned on the first part)",
        ("trace", "raw", "total", "robust", "oracle", "reduction", "default", "its replicas", "R&Q (paper)"),
        [
            (
                r["trace"][:44] + ("" if "total only" not in r["how"] else " (in sample)"), f"{r['lis_raw']:.3f}",
                f"{r['lis_total']:.3f}", f"{r['lis_robust']:.3f}", f"{r['lis_oracle']:.3f}",
                f"{r['reduction_robust']:.2f}x", f"{r['lis_default']:.3f}", f"{r['replicas_default']:.1f}",
                f"{r['lis_paper']:.3f}",
            )
            for r in expert_rows
        ],
    )  # fmt: skip
    figures = {
        **summary(rows), "published_case": published, "joint_vs_milp": joint_gaps(10 if step > 1 else 40),
        "experts": {r["trace"]: r["reduction_robust"] for r in expert_rows},
    }  # fmt: skip
    return figures, {"ranks": rows, "experts": expert_rows}


def times(quick: bool) -> tuple[dict, dict]:
    """Everything that a clock measures."""
    taken, grown = timings(), sizes(quick)
    console.table(
        "Time a plan (placement of all layers)",
        ("series", "layers", "experts", "ranks", "slots", "seconds", "ns per L S log2 S", "imbalance"),
        [
            (r["series"], r["layers"], r["experts"], r["ranks"], r["slots"], f"{r['seconds']:.4f}",
             f"{r['ns_per_LSlogS']:.1f}", f"{r['imbalance']:.4f}")
            for r in grown
        ],
    )  # fmt: skip
    return {"times_58x256_288_32": taken, "exponents": exponents(grown)}, {"sizes": grown}


def main() -> int:
    """Run everything, or one part and keep the other from `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"))
    parser.add_argument("--out", type=Path, default=None, help="folder for results.json and pictures")
    parser.add_argument("--quick", action="store_true", help="every fourth layer, fewer sizes")
    parser.add_argument("--only", choices=("balance", "times"), help="one part; --out keeps what it has of the other")
    arguments = parser.parse_args()
    figures: dict = {}
    document: dict = {}
    kept = arguments.out / "results.json" if arguments.out is not None else None
    try:
        cases = list(traces(arguments.traces)) if arguments.only != "times" else []
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.only != "balance":
        figures["compile_seconds"] = cold_compile()
    warm_up()
    for part, run in (
        ("balance", lambda: balance(cases, 4 if arguments.quick else 1)),
        ("times", lambda: times(arguments.quick)),
    ):
        if arguments.only in (None, part):
            found, rows = run()
            figures |= found
            document |= rows
    if arguments.only and kept is not None and kept.exists():
        before = json.loads(kept.read_text())
        figures = before.pop("summary") | figures
        document = before | document
    console.table(
        "Summary",
        ("figure", "value"),
        [(k, json.dumps(console.plain(v))) for k, v in figures.items() if k != "experts"],
    )
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(console.plain({"summary": figures, **document}), indent=1) + "\n")
        if "ranks" in document:
            draw_redundancy(document["ranks"], kept.parent / "redundancy.png")
        if "sizes" in document:
            draw_sizes(document["sizes"], kept.parent / "sizes.png")
    console.last_line(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
