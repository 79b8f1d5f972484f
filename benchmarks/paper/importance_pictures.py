"""Pictures of `importance_truth`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from product_change import ALL, NAME
from rank_agreement import spearman

from equipoise.files.atomic import atomic_file

# Okabe and Ito's colours, told apart with any colour vision; each has its own mark too.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"))


def draw_load(values: dict[str, Any], path: Path) -> None:
    """Figure 2: every expert of every layer, load against `wanda` and `error`."""
    load = np.array(values["load"])
    figure = Figure(figsize=(9, 3.8), dpi=100, layout="constrained")
    depth = np.repeat(np.arange(load.shape[0]), load.shape[1])
    for axes, (name, value) in zip(figure.subplots(1, 2), values["importance"].items(), strict=True):
        score = np.array(value)
        dots = axes.scatter(load.ravel() * 100, score.ravel(), c=depth, cmap="cividis", s=16)
        axes.set_xlabel("load, % of the layer's selections")
        axes.set_ylabel(name)
        positive = score[score > 0]
        if len(positive) and positive.max() > 30 * positive.min():
            axes.set_yscale("log")
        axes.set_title(f"{name}: Spearman {spearman(load, score).mean():+.2f} within a layer", fontsize=10)
        axes.grid(alpha=0.3)
    figure.colorbar(dots, label="layer")
    save(figure, path)


def draw_truth(values: dict[str, Any], scores: Mapping[str, npt.NDArray[np.float64]], path: Path) -> None:
    """What the profile says of an expert against what changing it does: a row a change, a column a predictor."""
    layers = values["layers"]
    figure = Figure(figsize=(9, 11), dpi=100, layout="constrained")
    grid = figure.subplots(len(ALL), 4, sharey="row")
    for row, change in zip(grid, ALL, strict=True):
        real = np.array(values["truth"][change]["divergence"]).mean(-1)
        columns = {
            "wanda": scores["wanda, higher is dearer"][layers],
            "load": scores["frequency"][layers],
            "error": scores["error"][layers],
            "fisher": np.array(values["predictors"]["int8" if change == NAME else change]["fisher"]),
        }
        for axes, (name, score) in zip(row, columns.items(), strict=True):
            for i, layer in enumerate(layers):
                colour, mark = STYLES[i % len(STYLES)]
                axes.plot(score[i], real[i], mark, color=colour, markersize=4.5, label=f"layer {layer}")
            axes.set_title(f"{name}: {float(spearman(score.ravel(), real.ravel())):+.2f}", fontsize=10)
            axes.set_yscale("log" if real.min() > 0 else "linear")
            if score.min() > 0 and score.max() > 30 * score.min():
                axes.set_xscale("log")
                axes.xaxis.set_minor_formatter(NullFormatter())  # less than a decade would label every tick
            else:
                axes.locator_params(axis="x", nbins=3)
                axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
                axes.xaxis.offsetText.set_fontsize(7)
            axes.grid(alpha=0.3)
            axes.tick_params(which="both", labelsize=7)
        row[0].set_ylabel(f"{change}: divergence, nats")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(layers), fontsize=9)
    figure.suptitle("One expert changed at a time: truth against prediction (title: Spearman, pooled)", fontsize=11)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a picture atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png")
