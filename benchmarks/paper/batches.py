"""Finding (i), Figure 3: does imbalance grow with the batch, and if so, why?

    text      padding left out: sum of the prompts' selections, which is what `equipoise` counts
    left      padding counted as a naive counter counts it, batches padded on the left (as for generation)
    right     the same, padded on the right (as lm-evaluation-harness pads prompts whose answers it scores)

LIS of each batch of B consecutive prompts and each layer, mean over both; `pooled` is the LIS of all batches
together. Without padding a token's route does not depend on the batch, and merging batches cannot raise the
token-weighted mean LIS: the largest of a sum is at most the sum of the largest.

Padding is routed by the model itself, once a side: a batch is padded to its longest prompt, and the routing of every
row is seen before padding is left out. What a smaller batch would hold of it follows exactly: attention is causal, so
the first p pads before a prompt, or behind it, are routed the same however many follow.

P prompts, L layers, E experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import prompts
import torch
from drawing import canvas, save
from prompts import padded
from sections import Section, picture, table
from subject import Subject

import equipoise as eq
from equipoise.models.families import MoELayer, Routing, find_layers
from equipoise.profiling.watching import watch
from equipoise.types import IntArray

SIZES = (1, 2, 4, 8, 16, 32)
SIDES = ("left", "right")
PADDED = 32
"""Prompts of a task that are run with padding."""
QUICK = ("mmlu", "piqa", "gsm8k")
"""Tasks of the small form."""


@torch.no_grad()
def pad_routing(model: Any, rows: Sequence[Sequence[int]], side: str, pad: int, size: int) -> list[IntArray]:
    """What the padding of each prompt selects, in batches of `size`.

    Args:
        model: with MoE layers.
        rows: token ids.
        side: `left` or `right`.
        pad: the token that pads.
        size: prompts a batch.

    Returns:
        For each prompt int64 [pads, L, k], from the first pad to the last.
    """
    layers = len(find_layers(model))
    out: list[IntArray] = []
    for start in range(0, len(rows), size):
        batch = padded(rows[start : start + size], side, pad)
        seen: dict[int, torch.Tensor] = {}

        def observe(row: int, layer: MoELayer, routing: Routing, real: Any, seen: dict[int, Any] = seen) -> None:
            seen[row] = routing.index  # all rows: padding has not been left out here

        with watch(model, observe):
            model.base_model(**{name: t.to(model.device) for name, t in batch.items()}, use_cache=False)
        shape = batch["input_ids"].shape
        chosen = torch.stack([seen[row].reshape(*shape, -1) for row in range(layers)], 2).cpu().numpy()
        out += [ids[mask == 0] for ids, mask in zip(chosen, batch["attention_mask"].numpy(), strict=True)]
    return out


def pad_counts(ids: IntArray, experts: int) -> IntArray:
    """Selections int64 [L, E] of pads [p, L, k]."""
    layers = ids.shape[1]
    flat = ids + np.arange(layers)[:, None] * experts
    return np.bincount(flat.ravel(), minlength=layers * experts).reshape(layers, experts)


def batch_counts(text: IntArray, lengths: Sequence[int], size: int, pads: Sequence[IntArray] | None = None) -> IntArray:
    """Selections of each batch of `size` consecutive prompts: int64 [batches, L, E].

    Args:
        text: int64 [P, L, E] selections of each prompt, padding left out.
        lengths: tokens of each prompt.
        size: B; a last, smaller batch is left out.
        pads: of each prompt int64 [pads, L, k], to be counted too.
    """
    out = []
    for start in range(0, len(text) // size * size, size):
        part = range(start, start + size)
        counts = text[start : start + size].sum(0)
        if pads is not None:
            width = max(lengths[i] for i in part)
            counts = counts + sum(pad_counts(pads[i][: width - lengths[i]], text.shape[2]) for i in part)
        out.append(counts)
    return np.stack(out)


def pad_share(lengths: Sequence[int], size: int) -> float:
    """Share of padding among all positions of the batches."""
    parts = [lengths[i : i + size] for i in range(0, len(lengths) // size * size, size)]
    return 1 - sum(map(sum, parts)) / sum(max(part) * len(part) for part in parts)


def measure(subject: Subject) -> dict[str, Any]:
    """Run the padded batches, count, score."""
    tokenizer = subject.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    model = subject.model("original").model
    out: dict[str, Any] = {"pad_token": tokenizer.convert_ids_to_tokens(pad), "tasks": {}}
    for task in QUICK if subject.quick else prompts.TASKS:
        rows, text = subject.prompts(task), subject.routing(task)
        number = min(PADDED, len(rows) // SIZES[-1] * SIZES[-1])
        rows, lengths = rows[:number], [len(row) for row in rows]
        pads = {side: pad_routing(model, rows[:number], side, pad, SIZES[-1]) for side in SIDES}
        experts = text.shape[2]
        values: dict[str, Any] = {"prompts": number, "all_prompts": len(text) // SIZES[-1] * SIZES[-1], "sizes": {}}
        for side in SIDES:
            own = [pad_counts(ids, experts) for ids in pads[side] if len(ids)]
            values[f"{side}_pads_lis"] = float(eq.lis(sum(own)).mean()) if own else None
        for size in SIZES:
            row: dict[str, Any] = {"pads": pad_share(lengths[:number], size)}
            every = batch_counts(text[: values["all_prompts"]], lengths, size)
            row["text_all"] = float(eq.lis(every).mean())
            for name in ("text", *SIDES):
                counts = batch_counts(text[:number], lengths, size, pads.get(name))
                row[name] = float(eq.lis(counts).mean())
                row[f"{name}_pooled"] = float(eq.lis(counts.sum(0)).mean())
            values["sizes"][str(size)] = row
        out["tasks"][task] = values
    out["most"] = float(text.shape[2] / (text[0].sum(-1).max() / lengths[0]))
    return out


def mean(values: dict[str, Any], name: str) -> list[float]:
    """Mean over tasks of a figure, by batch size."""
    return [float(np.mean([task["sizes"][str(size)][name] for task in values["tasks"].values()])) for size in SIZES]


def moved(before: float, after: float) -> str:
    """`rises from .. to ..`, `falls ..`, or `stays ..` (within 1 %)."""
    change = after / before - 1
    word = "stays at" if abs(change) <= 0.01 else "rises from" if change > 0 else "falls from"
    return f"{word} {before:.3f}" + ("" if abs(change) <= 0.01 else f" to {after:.3f} ({change:+.1%})")


def verdict(values: dict[str, Any]) -> str:
    """What the figures say about the paper's finding, in words."""
    text = mean(values, "text_all")
    said = [f"With padding left out, LIS {moved(text[0], text[-1])} between batches of 1 and {SIZES[-1]} prompts."]
    rises = {side: mean(values, f"{side}_pooled") for side in SIDES}
    grown = [side for side in SIDES if rises[side][-1] > 1.01 * rises[side][0]]
    if text[-1] <= 1.01 * text[0]:
        said.append(
            "The load of real tokens gives no rise: a token's route does not depend on its batch, and the busiest "
            "expert of several texts together is never busier than the sum of each text's busiest."
        )
    else:
        said.append("That is a rise without any padding.")
    for side in SIDES:
        batch, own = mean(values, side), [task[f"{side}_pads_lis"] for task in values["tasks"].values()]
        own = [x for x in own if x is not None]
        said.append(
            f"With padding on the {side} counted as if it were text, LIS a batch {moved(batch[0], batch[-1])}, "
            f"and LIS of all batches together {moved(rises[side][0], rises[side][-1])}"
            + (
                f"; the padding by itself has an LIS of {np.mean(own):.2f} (at most {values['most']:.0f})"
                if own
                else ""
            )
            + "."
        )
    if grown:
        said.append(f"So a count that includes padding (on the {' or the '.join(grown)}) grows with the batch by its "
                    f"padding, {mean(values, 'pads')[-1]:.0%} of all positions at {SIZES[-1]}.")  # fmt: skip
    else:
        said.append("So on this model counting padding does not make LIS grow with the batch either.")
    if text[-1] <= 1.01 * text[0]:
        said.append("The paper's finding (i), that imbalance worsens with larger batches, "
                    + ("is seen here only where padding is counted." if grown else "is not seen here."))  # fmt: skip
    else:
        said.append("That agrees with the paper's finding (i), that imbalance worsens with larger batches.")
    return " ".join(said)


def section(values: dict[str, Any], folder: Path, quick: bool) -> Section:
    """Figure 3 and its table."""
    figure, axes = canvas(3.9, 1, 2)
    lines = (
        ("text", "padding left out", "#0072b2", "o-"),
        ("left", "padding counted, left", "#d55e00", "^--"),
        ("right", "padding counted, right", "#e69f00", "v:"),
    )
    for name, label, colour, style in lines:
        for axis, suffix in zip(axes[0], ("", "_pooled"), strict=True):
            axis.plot(SIZES, mean(values, name + suffix), style, color=colour, label=label)
    for axis, title in zip(axes[0], ("LIS of a batch, mean", "LIS of all batches together"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks(SIZES, [str(size) for size in SIZES])
        axis.set_xlabel("prompts a batch")
        axis.set_ylabel("LIS, mean over layers and tasks (1 is even)")
        axis.set_title(title)
    axes[0, 0].legend()
    path = save(figure, folder / "batches.png")
    columns = ("prompts a batch", *map(str, SIZES))
    names = {
        "text_all": "padding left out, all prompts", "text": "padding left out", "left": "padding counted, left",
        "right": "padding counted, right", "text_pooled": "together: padding left out",
        "left_pooled": "together: padding counted, left", "right_pooled": "together: padding counted, right",
    }  # fmt: skip
    rows = [(label, *(f"{x:.3f}" for x in mean(values, name))) for name, label in names.items()]
    rows.append(("padding among all positions", *(f"{x:.0%}" for x in mean(values, "pads"))))
    tasks = [
        (prompts.TITLES[task], *(f"{row['sizes'][str(size)]['text_all']:.3f}" for size in SIZES))
        for task, row in values["tasks"].items()
    ]
    first = next(iter(values["tasks"].values()))
    text = (
        f"{verdict(values)}\n\n{picture(path, 'LIS against batch size, padding left out and counted')}\n\n"
        f"Mean over layers and {len(values['tasks'])} tasks, {first['prompts']} prompts a task (first row: "
        f"{first['all_prompts']}), in the order in which they come; the padding token is `{values['pad_token']}` and "
        "the attention mask leaves it out. "
        "For generation batches are padded on the left; lm-evaluation-harness pads on the right where it scores "
        "answers.\n\n"
        f"{table(columns, rows)}\n\nPadding left out, by task, all prompts:\n\n{table(columns, tasks)}\n"
    )
    return Section("Figure 3: imbalance and batch size (finding i)", text)
