"""What `evaluate.py` shows: the thinned log, the curve, the tables of the README. Pure formatting, no measuring."""

import re
from pathlib import Path

import data
import numpy as np


def thin(log: list[dict], limit: int = 400) -> list[dict]:
    """Keeps the header, every validation and evenly many of the other records."""
    plain = [i for i, r in enumerate(log) if "step" in r and "val_loss" not in r]
    keep = set(plain[:: max(1, -(-len(plain) // limit))])
    return [r for i, r in enumerate(log) if i in keep or "val_loss" in r or "step" not in r]


def plot(log: list[dict], ngram: dict[str, float], path: Path) -> None:
    """Validation loss a domain and LIS a layer over training tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    points = [r for r in log if "val_loss" in r]
    tokens = [r["tokens"] / 1e6 for r in points]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for i, domain in enumerate(data.DOMAINS):
        left.plot(tokens, [r["val_loss"][domain] for r in points], color=f"C{i}", label=domain)
        left.axhline(ngram[domain], color=f"C{i}", linestyle=":", linewidth=0.8)
    left.set(
        xlabel="training tokens (millions)",
        ylabel="held-out loss (nats a token)",
        title="Validation loss (dotted: 5-gram, all training text)",
        ylim=(None, 7),
    )
    left.legend(fontsize=7, ncol=2)
    for layer in range(len(points[0]["lis"])):
        right.plot(tokens, [r["lis"][layer] for r in points], label=f"layer {layer}")
    right.set(
        xlabel="training tokens (millions)",
        ylabel="LIS (1 is perfect balance)",
        title="Load imbalance on held-out text, domains pooled",
        ylim=(1, None),
    )
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def fill_readme(path: Path, r: dict) -> None:
    """Rewrites the tables between the README's markers, so its figures are those of results.json."""
    perplexity = [
        [
            d,
            f"{v['tokens']:,}",
            f"**{v['model']:.1f}**",
            f"{v['model_1024']:.1f}",
            f"{v['ngram']:.1f}",
            f"{v['ngram_own_domain']:.1f}" if "ngram_own_domain" in v else "",
            f"{v['ratio']:.2f}",
        ]
        for d, v in r["perplexity"].items()
    ]
    spread = [[d, *(f"{x:.2f}" for x in v), f"{np.mean(v):.2f}"] for d, v in r["lis"].items()]
    header = ["held-out text", *(f"layer {i}" for i in range(len(next(iter(r["lis"].values()))))), "mean"]
    t, m = r["training"], r["model"]
    facts = [
        ["parameters", f"{m['parameters']:,}"],
        ["`model.safetensors`", f"{m['bytes']:,} bytes"],
        ["training tokens seen", f"{t['tokens']:,} in {t['steps']:,} steps"],
        ["unique training tokens", f"{t['unique_tokens']:,}"],
        ["time", f"{t['seconds'] / 60:.0f} minutes"],
        ["same most likely token, exported against training module", f"{100 * r['agreement']['same_argmax']:.1f} %"],
        [
            "loss, exported / training module",
            f"{r['agreement']['loss_exported']:.4f} / {r['agreement']['loss_training_module']:.4f}",
        ],
    ]
    overlap = "; ".join(f"{d} {100 * x:.1f} %" for d, x in r["held_out_overlap"].items() if x > 0)
    blocks = {
        "facts": table(["", ""], facts),
        "perplexity": table(
            [
                "domain",
                "tokens",
                "model",
                "model, 1024 window",
                "5-gram, all text",
                "5-gram, own domain",
                "model / best 5-gram",
            ],
            perplexity,
        ),
        "lis": table(header, spread),
        "overlap": f"Held-out characters in lines that training text has word for word: {overlap}.",
    }
    text = path.read_text(encoding="utf-8")
    for name, block in blocks.items():
        text = re.sub(
            rf"(<!-- {name} -->).*?(<!-- end -->)", lambda m, b=block: f"{m[1]}\n{b}\n{m[2]}", text, flags=re.S
        )
    path.write_text(text, encoding="utf-8")
