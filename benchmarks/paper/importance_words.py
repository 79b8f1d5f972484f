"""What the figures of `importance_truth` say, in tables and sentences; every sentence is chosen by the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from expert_changes import CHANGES
from expert_predictors import NAMES as PREDICTORS
from measured_layer import NAME as MEASURED
from product_change import ALL
from product_change import NAME as W8A8
from rank_agreement import Agreement, agreement, repeatability, spearman
from sections import interval, table

from equipoise.evaluation.perplexity import half_width

BAR = 0.7
NAMES = (*PREDICTORS, MEASURED)
TRUTHS = {"divergence": "divergence", "rise": "rise of the loss"}
Scores = Mapping[str, npt.NDArray[np.float64]]
Agreements = dict[tuple[str, str, str], Agreement]
"""By truth, change and predictor."""


def agreements(values: dict[str, Any], scores: Scores) -> Agreements:
    """Of every predictor with every truth, over the experts that were changed one at a time."""
    rows = values["layers"]
    found = {}
    for change in ALL:
        named = {name: score[rows] for name, score in scores.items()}
        # The predictors round weights alone; what they say of int8 is the nearest they have to W8A8.
        predictors = values["predictors"]["int8" if change == W8A8 else change]
        named |= {name: np.array(predictors[name]) for name in NAMES}
        for truth in TRUTHS:
            real = np.array(values["truth"][change][truth]).mean(-1)
            for name, score in named.items():
                # The slope has a sign, which only the rise has.
                score = np.abs(score) if (name, truth) == ("slope", "divergence") else score
                found[truth, change, name] = agreement(score, real)
    return found


def load_text(values: dict[str, Any]) -> str:
    """Figure 2: is load importance?"""
    load = np.array(values["load"])
    measured = {name: np.array(v) for name, v in values["importance"].items()}
    pairs = {f"load and `{name}`": (load, v) for name, v in measured.items()}
    pairs["`wanda` and `error`"] = (measured["wanda"], measured["error"])
    rows, strength = [], {}
    for name, (a, b) in pairs.items():
        each = spearman(a, b)
        strength[name] = float(each.mean())
        pooled = float(spearman(a.ravel(), b.ravel()))
        rows.append([name, f"{each.mean():+.2f}", f"{each.min():+.2f} to {each.max():+.2f}", f"{pooled:+.2f}"])
    same = {name: float((load.argmin(1) == v.argmin(1)).mean()) for name, v in measured.items()}
    apart = [name for name, r in strength.items() if abs(r) < 0.5 and name.startswith("load")]
    near = [name for name, r in strength.items() if abs(r) >= 0.5 and name.startswith("load")]
    words = [f"Finding (ii) is that an expert's load and its importance are different things. {load.size} experts:"]
    words.append(table(["Spearman of", "mean within a layer", "layers", "pooled"], rows))
    said = []
    if apart:
        said.append(f"{_list(apart)} agree by less than 0.5 within a layer: there load does not stand for importance.")
    if near:
        signs = ["rises" if strength[n] > 0 else "falls" for n in near]
        halves = [f"{n.removeprefix('load and ')} {sign} with load" for n, sign in zip(near, signs, strict=True)]
        said.append(
            f"{_list(halves)} (0.5 or more within a layer): a rarely chosen expert "
            "adds little to a sum over tokens, so here load is a good part of importance."
        )
    shares = _list([f"{100 * share:.0f} % of layers by `{name}`" for name, share in same.items()])
    said.append(
        f"The least loaded expert also has the lowest score in {shares} (by chance {100 / load.shape[1]:.0f} %)."
    )
    return "\n\n".join([*words, " ".join(said)])


def truth_text(values: dict[str, Any], found: Agreements, quick: bool) -> str:
    """Which measure predicts the truth."""
    layers, experts = len(values["layers"]), len(values["load"][0])
    where = f"{_list([str(n) for n in values['layers']])}" if layers < 9 else f"{layers} layers"
    intro = (
        f"### One expert at a time\n\nEvery expert of layer{'s' * (layers > 1)} {where} ({layers * experts} in all) is "
        "changed while all others stay: held as the product's `int8` (W8A8: weights and tokens rounded; `error` is "
        "measured for this), its weights alone rounded to int8, or to 4 bits (which magnifies the effect), or removed. "
        f"{values['tokens']} tokens that calibration has not seen, {len(values['domains'])} windows, float32. "
        "The *divergence* is the mean KL divergence of the next-token distribution from the untouched model's; the "
        "*rise* is that of the loss on the text. The rise is the divergence plus a term whose mean is 0 for text that "
        "the model itself would write and whose spread a token is about sqrt(2 divergence), so small effects show in "
        "the divergence long before they show in the loss."
    )
    return "\n\n".join(
        [
            intro,
            _effects(values),
            *(_agreement_table(found, truth) for truth in TRUTHS),
            _definitions(),
            verdict(values, found, quick),
        ]
    )


def _effects(values: dict[str, Any]) -> str:
    rows = []
    for change in ALL:
        divergence, rise = (np.array(values["truth"][change][name]) for name in TRUTHS)
        means = divergence.mean(-1)
        half = np.apply_along_axis(half_width, -1, rise)
        seen = np.abs(rise.mean(-1)) > half
        overall = rise.mean((0, 1))
        rows.append(
            [
                change,
                f"{means.mean():.1e}",
                f"{means.min():.1e} to {means.max():.1e}",
                _times(overall.mean(), half_width(overall)),
                f"{seen.sum()} of {seen.size}",
                *(f"{repeatability(v):.2f}" for v in (divergence, rise)),
            ]
        )
    columns = [
        "change", "mean divergence, nats", "experts", "mean rise, 10^-3 nats", "rises that differ from 0",
        "repeatability of the divergence", "of the rise",
    ]  # fmt: skip
    return (
        table(columns, rows)
        + "\n\nIntervals are 95 % over windows. *Repeatability* is the rank agreement to expect of "
        "another measurement on as many windows (halves compared, Spearman-Brown); no predictor can be expected to "
        "agree with a truth much better than its square root."
    )


def _times(value: float, half: float) -> str:
    return interval(1e3 * value, 1e3 * (value - half), 1e3 * (value + half), 2)


def _agreement_table(found: Agreements, truth: str) -> str:
    names = list(dict.fromkeys(name for _, _, name in found))
    rows = []
    for name in names:
        row = [_code(name)]
        for change in ALL:
            a = found[truth, change, name]
            row.append(f"{a.pooled[0]:+.2f} [{a.pooled[1]:+.2f}, {a.pooled[2]:+.2f}]")
            row.append(f"{a.within[0]:+.2f}")
        rows.append(row)
    columns = [f"Spearman with the {TRUTHS[truth]}"]
    for change in ALL:
        columns += [f"{change}, pooled", "within"]
    return table(columns, rows)


def _definitions() -> str:
    return (
        "*Pooled* is over all experts that were changed, with a 95 % bootstrap interval over experts; *within* is the "
        "mean of the coefficients within a layer. Calibration is on other text of the same mixture of tasks. `error`, "
        "wanda and frequency are the product's profile of it, `error` for W8A8: "
        "each layer's divergence with all its experts lowered, measured, parted among them by the root of what "
        "gradients say. The others are for comparison, from calibration tokens too, with weights alone rounded (beside "
        "W8A8 stands what they say of int8): `own error` is the change of the layer's output as a share of it; "
        "`error x layer` weights the squared change of a layer's output by the layer's mean squared gradient of the "
        "log-probability of next tokens that the model drew, `error x token` by each token's; `fisher` is half the "
        "mean square of the product of change and gradient, the second-order term of the divergence; `slope` is the "
        "first-order change of the loss on the calibration text (its magnitude, against the divergence); `size` is the "
        "gate-weighted norm of what the expert says; `measured layer` is no gradient: the divergence that lowering all "
        "experts of the layer at once causes on calibration text, shared among them by the root of `error x token`. "
        "`benchmarks/paper/expert_predictors.py` and `measured_layer.py` have the formulas."
    )


def verdict(values: dict[str, Any], found: Agreements, quick: bool) -> str:
    """The bar: `error` against the truth with Spearman at least `BAR`, or what does reach it."""
    said = []
    for truth, words in TRUTHS.items():
        at = {change: found[truth, change, "error"].pooled for change in ALL}
        figures = _list([f"{r[0]:+.2f} [{r[1]:+.2f}, {r[2]:+.2f}] ({change})" for change, r in at.items()])
        met = [change for change, r in at.items() if r[0] >= BAR]
        unmet = [change for change in ALL if change not in met]
        outcome = f"the bar of {BAR} is " + (
            "met for all" if not unmet else f"met for {_list(met)}, not for {_list(unmet)}" if met else "not met"
        )
        said.append(f"**`error` against the {words}: {figures}; {outcome}.**")
        for change in unmet:
            said.append(_instead(values, found, truth, change))
    best = max(at_error := {c: _best(found, "divergence", c) for c in ALL}, key=lambda c: at_error[c][1])
    name, value = at_error[best]
    said.append(f"The best agreement of all with a divergence is {value:+.2f}, of {_code(name)} ({best}).")
    wanda = [name for name in dict.fromkeys(n for _, _, n in found) if name.startswith("wanda")]
    mean = {name: float(np.mean([found["divergence", c, name].within[0] for c in ALL])) for name in wanda}
    right = max(mean, key=lambda name: mean[name])
    said.append(
        f"Of wanda's two directions, {right.removeprefix('wanda, ')!r} agrees better with the divergence within layers "
        f"({mean[right]:+.2f} on the mean of the changes; the other is its negative)."
    )
    if quick:
        said.append("This is the small form, for trying out: few experts and tokens, and nothing to conclude from.")
    return "\n\n".join(said)


def _instead(values: dict[str, Any], found: Agreements, truth: str, change: str) -> str:
    """What predicts a truth that `error` does not, or why nothing can."""
    name, value = _best(found, truth, change)
    repeats = repeatability(np.array(values["truth"][change][truth]))
    what = f"{change}, {TRUTHS[truth]}: "
    if value >= BAR:
        return f"- {what}{_code(name)} does reach it, {value:+.2f}."
    reach = f"- {what}nothing tried reaches it; the nearest is {_code(name)} with {value:+.2f}."
    if not repeats >= BAR**2:
        reach += (
            f" The truth itself repeats with only {repeats:+.2f} at this many tokens, so a perfect predictor would "
            "not be seen to reach it either."
        )
    return reach


def _best(found: Agreements, truth: str, change: str) -> tuple[str, float]:
    """Predictor and pooled coefficient of the best for a truth; random draws do not compete."""
    of = {n: a.pooled[0] for (t, c, n), a in found.items() if (t, c) == (truth, change) and n != "random"}
    name = max(of, key=lambda n: of[n])
    return name, of[name]


def _code(name: str) -> str:
    return f"`{name}`" if name in ("error", *NAMES) else name


def together_text(values: dict[str, Any], choosers: Sequence[str]) -> str:
    """Table 5: least and most important of every layer at once."""
    part = values["together"]
    cells, divergences = {}, {}
    for row in part["rows"]:
        key = row["by"], row["end"], row["change"]
        rise = np.array(row["rise"])
        half = half_width(rise)
        percent = [100 * float(np.expm1(v)) for v in (rise.mean(), rise.mean() - half, rise.mean() + half)]
        cells[key] = interval(*percent, 2)
        divergences[key] = float(np.mean(row["divergence"]))
    rows = []
    for by in choosers:
        for end in ("least", "most"):
            row = [f"{by}: {end} important"]
            for change in CHANGES:
                row += [cells[by, end, change], f"{1e3 * divergences[by, end, change]:.3g}"]
            rows.append(row)
    columns = ["chosen by"]
    for change in CHANGES:
        columns += [f"{change}: perplexity, %", "divergence"]
    before = float(np.exp(np.mean(part["rows"][0]["before"])))
    said = [
        "### One expert of every layer at once (Table 5)",
        f"The expert that a measure calls least, or most, important in each layer is changed in all layers at once: "
        f"change of the perplexity (before: {before:.2f}) with its paired 95 % interval over {len(part['domains'])} "
        f"windows, and divergence in 10^-3 nats, on {part['tokens']} tokens. A good measure has a small change in its "
        "first row and a large one in its second.",
        table(columns, rows),
    ]
    for change in CHANGES:
        order = sorted(choosers, key=lambda by: divergences[by, "least", change])
        gap = {by: divergences[by, "most", change] / max(divergences[by, "least", change], 1e-12) for by in choosers}
        widest = max(gap, key=lambda by: gap[by])
        said.append(
            f"- {change}: the least important by {_code(order[0])} cost least "
            f"({1e3 * divergences[order[0], 'least', change]:.3g} 10^-3 nats), by {_code(order[-1])} most "
            f"({1e3 * divergences[order[-1], 'least', change]:.3g}); {_code(widest)} tells the two ends apart best "
            f"(factor {gap[widest]:.1f})."
        )
    return "\n\n".join(said[:3]) + "\n\n" + "\n".join(said[3:])


def _list(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
