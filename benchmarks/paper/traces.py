"""R&Q, joint and streaming on every measured real trace, beside what the papers published.

    held out      per-token ids: the first tenth of the tokens plans, the rest is scored in windows of 1,024;
                  a series: its first tenth of steps, at least one (then often one corpus, scored on the others);
                  only a total: in sample, and said so
    R&Q           preset paper, importance by frequency (traces have no other)
    joint         budget 1.0, as many replicas as the default buys; `E/4`: exactly E/4 a layer
    oracle        E/4 replicas a layer, placed for each scored window by itself
    streaming     windows of 512 tokens (128 where those are fewer than eight) or the steps of a series, E/4 spare slots

Traces with altered input (short texts filled up by drawing their own tokens again) come in a table of their own: their
skew is overstated. No model runs here, so LASER, which needs the gate's scores, has no column.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from drawing import COLOURS, LABELS, MARKERS, canvas, save
from sections import Section, picture, table

import equipoise as eq
from equipoise.errors import InputError
from equipoise.files import load_profile
from equipoise.planning import take_part
from equipoise.scoring import score
from equipoise.streaming import POLICIES, Replay, Stream, load_stream, replay
from equipoise.types import Profile

JOINED = {"deepseek-v2-lite_esft_*": ("intent", "summary", "translation")}
"""Traces of one model that are streamed one after another as well."""
FEWEST = 4
"""Windows a stream needs here."""

NOT_HERE = "not available here"
PUBLISHED = {"DeepSeek-MoE": "R&Q", "DeepSeek-V2-Lite": "R&Q", "Mixtral": "LASER"}
"""Models that a paper measured too, and whose."""
SOURCES = (
    'R&Q (arXiv 2602.19938): of the paper only its abstract could be read here, which says "up to 1.4x reduction in '
    'imbalance with accuracy maintained within +/-0.6%" (https://arxiv.org/abs/2602.19938v1); no figure by model is '
    "quoted from memory. LASER (arXiv 2510.03293): its abstract (https://arxiv.org/abs/2510.03293v1) names "
    "Mixtral-8x7B and DeepSeek-MoE-16b-chat and gives no figure."
)


def parts(profile: Profile) -> tuple[Profile, Profile, str]:
    """What plans, what is scored, and how that was cut."""
    if profile.topk_ids is not None:
        return (
            take_part(profile, tokens="0:10%"), take_part(profile, tokens="10%:", window=1024), "tokens, first 10 %"
        )  # fmt: skip
    if profile.series is not None:
        steps = len(profile.series)
        first = max(1, steps // 10)
        return (
            take_part(profile, steps=f"0:{first}"), take_part(profile, steps=f"{first}:"), f"steps, {first} of {steps}"
        )  # fmt: skip
    return profile, profile, "total, in sample"


def planned(profile: Profile) -> dict[str, Any]:
    """LIS raw, planned and oracle of one trace."""
    plan_on, score_on, how = parts(profile)
    quarter = max(1, profile.num_experts // 4)
    out: dict[str, Any] = {
        "layers": profile.num_layers, "experts": profile.num_experts, "top_k": profile.top_k, "how": how
    }  # fmt: skip
    options: dict[str, dict[str, Any]] = {
        "paper": {"preset": "paper", "importance": "frequency"},
        "joint": {"budget": 1.0},
        "quarter": {"budget": 1.0, "replicas": quarter},
    }
    for name, chosen in options.items():
        made = eq.plan(plan_on, **chosen)
        found = score(made, score_on).means()
        out[name] = found["lis"]
        out["raw"], out["windows"] = found["lis_raw"], found["windows"]
        if name == "quarter":
            out["oracle"] = found["lis_oracle"]
        if name == "joint":
            out["replicas"] = made.num_replicas / profile.num_layers
    return out


def stream_of(files: list[Path]) -> Stream | None:
    """The stream of one or more traces, None where there are too few windows."""
    profiles = [load_profile(file) for file in files]
    ids = all(p.topk_ids is not None for p in profiles)
    if not ids and any(p.series is None or len(p.series) < FEWEST for p in profiles):
        return None
    tokens = sum(len(p.topk_ids) for p in profiles if p.topk_ids is not None)
    window = (512 if tokens >= 8 * 512 else 128) if ids else None
    return load_stream(files, window) if window is None or tokens // window >= FEWEST else None


def streamed(stream: Stream) -> dict[str, Any]:
    """LIS and moves of each policy, E/4 spare slots."""
    result = Replay(POLICIES)
    result.steps.extend(replay(stream.parts, max(1, stream.parts.shape[-1] // 4)))
    kind = f"{stream.window} tokens" if stream.window else "steps of the series"
    return {"lis": result.lis(), "moves": result.moves(), "steps": len(result.steps), "window": kind}


def measured(folder: Path) -> Iterator[tuple[str, Path, Profile]]:
    """Every measured trace: name, file, profile.

    Raises:
        InputError: there is none.
    """
    found = False
    for path in sorted(folder.glob("*.npz")):
        profile = load_profile(path)
        if profile.meta.get("measured") is True:
            found = True
            yield path.stem, path, profile
    if not found:
        raise InputError(
            f"no measured trace in {folder}: give --traces DIR, the folder of the published routing traces"
        )


def measure(traces: Path, quick: bool = False) -> dict[str, Any]:
    """Every trace; the small form takes those of at most 64 experts a layer."""
    out: dict[str, Any] = {"traces": {}, "joined": {}, "left_out": []}
    for name, path, profile in measured(traces):
        if quick and profile.num_experts > 64:
            out["left_out"].append(name)
            continue
        row = {
            "model": str(profile.meta.get("model")),
            "altered": "altered input" in str(profile.meta.get("phase")), **planned(profile),
        }  # fmt: skip
        stream = stream_of([path])
        out["traces"][name] = {**row, "stream": None if stream is None else streamed(stream)}
    for name, last in JOINED.items():
        files = [traces / f"{name.replace('*', part)}_topk.npz" for part in last]
        if all(file.is_file() for file in files) and (stream := stream_of(files)) is not None:
            out["joined"][name.replace("_*", " " + ", ".join(last))] = streamed(stream)
    return out


def published(model: str) -> str:
    """What a paper says of that model, or that it could not be read here."""
    paper = next((whose for start, whose in PUBLISHED.items() if model.startswith(start)), None)
    return "" if paper is None else f"{paper}: {NOT_HERE}"


def geometric(ratios: list[float]) -> float:
    """Geometric mean."""
    return float(np.exp(np.mean(np.log(ratios))))


def verdict(values: dict[str, Any]) -> str:
    """What the figures say."""
    rows = {n: r for n, r in values["traces"].items() if not r["altered"]}
    held = {n: r for n, r in rows.items() if "in sample" not in r["how"]}
    less = {name: geometric([r["raw"] / r[name] for r in held.values()]) for name in ("paper", "joint", "quarter")}
    most = max(r["raw"] / r["paper"] for r in held.values())
    said = [f"On {len(held)} real traces, held out, R&Q lowers LIS {less['paper']:.2f}x (geometric mean; at most "
            f"{most:.2f}x, where the paper's abstract says up to 1.4x), joint with E/4 replicas {less['quarter']:.2f}x "
            f"and with as many as its budget buys {less['joint']:.2f}x."]  # fmt: skip
    worse = [n for n, r in held.items() if r["paper"] > 1.005 * r["raw"]]
    if worse:
        said.append(f"R&Q is worse than no plan on {', '.join(worse)}.")
    streams = [r["stream"]["lis"] for r in rows.values() if r["stream"]]
    if streams:
        by = {
            p: geometric([s["raw"] / s[p] for s in streams]) for p in ("static", "long", "short", "adaptive", "oracle")
        }
        said.append(f"Deciding again at every window ({len(streams)} streams, E/4 spare slots): "
                    + ", ".join(f"{LABELS[p]} {x:.2f}x" for p, x in by.items()) + ".")  # fmt: skip
    for name, row in values["joined"].items():
        best = min(("static", "long", "short", "adaptive"), key=lambda policy, lis=row["lis"]: lis[policy])
        said.append(f"Where the text changes ({name}, one after another): raw {row['lis']['raw']:.3f}, static "
                    f"{row['lis']['static']:.3f}, best {LABELS[best]} {row['lis'][best]:.3f}, oracle "
                    f"{row['lis']['oracle']:.3f}.")  # fmt: skip
    return " ".join(said)


def section(values: dict[str, Any], folder: Path, quick: bool) -> Section:
    """Tables of all traces, and a picture."""
    rows, text = values["traces"], [verdict(values)]
    real = [n for n, r in rows.items() if not r["altered"]]
    path = save(draw({n: rows[n] for n in real}), folder / "traces.png")
    text.append(picture(path, "LIS of every measured trace: raw, R&Q, joint, oracle"))
    columns = ("trace", "layers x experts, top-k", "planned on", "raw", "R&Q", "less by", "joint E/4", "joint",
               "its replicas", "oracle E/4", "published LIS")  # fmt: skip
    altered = [n for n, r in rows.items() if r["altered"]]
    for title, names in (("Held out where the trace allows it.", real), ("Altered input, skew overstated:", altered)):
        if names:
            text.append(title + "\n\n" + table(columns, [line(n, rows[n]) for n in names]))
    text.append(f"Published figures. {SOURCES}")
    streams = {n: rows[n]["stream"] for n in (*real, *altered) if rows[n]["stream"]} | values["joined"]
    lines = [
        (
            name + (" (altered)" if name in altered else ""), row["window"], row["steps"],
            *(f"{row['lis'][p]:.3f}" for p in POLICIES), *(row["moves"][p] for p in ("short", "adaptive")),
        )
        for name, row in streams.items()
    ]  # fmt: skip
    columns = ("stream", "windows", "steps", *(LABELS[p] for p in POLICIES), "moved, short", "moved, adaptive")
    text.append("Streaming, E/4 spare slots a layer; the first window places and is not scored. Where windows are of "
                "tokens they are shorter than above, so LIS is higher.\n\n" + table(columns, lines))  # fmt: skip
    if values["left_out"]:
        text.append(f"Left out in the small form: {', '.join(values['left_out'])}.")
    return Section("Real traces of other models", "\n\n".join(text) + "\n")


def line(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    return (
        name, f"{row['layers']} x {row['experts']}, {row['top_k'] or '?'}", row["how"], f"{row['raw']:.3f}",
        f"{row['paper']:.3f}", f"{row['raw'] / row['paper']:.2f}x", f"{row['quarter']:.3f}", f"{row['joint']:.3f}",
        f"{row['replicas']:.1f}", f"{row['oracle']:.3f}", published(row["model"]),
    )  # fmt: skip


def draw(rows: dict[str, Any]) -> Any:
    """A line a trace, its LIS by variant on a logarithmic axis."""
    figure, axes = canvas(1.6 + 0.24 * len(rows), 1, 1)
    axis = axes[0, 0]
    names = sorted(rows, key=lambda n: rows[n]["raw"])
    for variant, key in (("oracle", "oracle"), ("joint", "quarter"), ("paper", "paper"), ("raw", "raw")):
        marker = "|" if variant == "oracle" else MARKERS[variant]
        label = {"joint": "joint, E/4 replicas", "oracle": "oracle, E/4 replicas"}.get(variant, LABELS[variant])
        axis.plot([rows[n][key] for n in names], range(len(names)), linestyle="", marker=marker, markersize=7,
                  markeredgewidth=2 if marker == "|" else 1, color=COLOURS[variant], label=label)  # fmt: skip
    shown = [name + (" (in sample)" if "in sample" in rows[name]["how"] else "") for name in names]
    axis.set_yticks(range(len(names)), shown, fontsize=8)
    axis.set_xscale("log")
    ticks = [t for t in (0.7, 1, 1.5, 2, 3, 5, 10, 20, 40) if t <= 1.2 * max(rows[n]["raw"] for n in names)]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    axis.axvline(1, color="black", linewidth=1, linestyle=":")
    axis.set_xlabel("LIS, mean over windows and layers (1 is even)")
    axis.set_title("Imbalance of real traces, planned on the first part, scored on the rest")
    axis.legend(loc="lower right")
    return figure
