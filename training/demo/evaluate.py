"""Measures the demo model against a 5-gram model, and how uneven its routing is.

    python training/demo/evaluate.py --data ../shared/data --work DIR --model src/equipoise/demo/model \
        --out training/demo

Everything is measured on the exported bf16 checkpoint as `AutoModelForCausalLM` loads it, on held-out documents: at
most 100 spans of 1,024 tokens a domain. Perplexity is a token (byte-level BPE of 4096). The 5-gram models (`ngram.py`)
score the very same tokens and see their full four tokens of context across windows. One 5-gram is trained on all
unique training text, a further one a domain on that domain alone.

    LIS[l] = E * max_e n[l, e] / (T * k),  n the selections of expert e in layer l over T tokens

Writes `results.json`, `log.jsonl` (the training log, thinned) and `curve.png`, and the tables of the README
between its markers. The last line of stdout is the JSON of the headline figures. Cost: about five
minutes, and as many for the 5-gram models the first time.
"""

import argparse
import json
from pathlib import Path

import data
import model as modeling
import numpy as np
import torch
from ngram import KneserNey, self_check
from report import fill_readme, plot, thin
from train import lis, mixtral_config
from transformers import AutoModelForCausalLM, AutoTokenizer

SPANS = 100  # spans of 1,024 tokens scored a domain, spread over its held-out documents


class Counter:
    """Counts selections a layer from the routers' own output, until closed."""

    def __init__(self, model: torch.nn.Module) -> None:
        experts = model.config.num_local_experts
        self.counts = np.zeros((model.config.num_hidden_layers, experts), dtype=np.int64)
        self.handles = [
            layer.mlp.gate.register_forward_hook(
                lambda _m, _i, out, at=at: self.counts.__setitem__(
                    at, self.counts[at] + np.bincount(out[2].reshape(-1).numpy(), minlength=experts)
                )
            )
            for at, layer in enumerate(model.model.layers)
        ]

    def take(self) -> np.ndarray:
        """Counts since the last call: [L, E]."""
        counts, self.counts = self.counts, np.zeros_like(self.counts)
        return counts


@torch.no_grad()
def score(model: torch.nn.Module, rows: np.ndarray, batch_tokens: int = 8192) -> np.ndarray:
    """Log-probability (nats) of each next token: rows [n, S + 1] -> [n, S] float64."""
    size = max(1, batch_tokens // (rows.shape[1] - 1))
    parts = []
    for start in range(0, len(rows), size):
        ids = torch.from_numpy(rows[start : start + size])
        logits = model(ids[:, :-1]).logits.float()
        parts.append((logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)).double().numpy())
    return np.concatenate(parts)


def agreement(model: torch.nn.Module, work: Path, rows: np.ndarray) -> dict[str, float]:
    """The exported checkpoint against the float32 training module on the same tokens."""
    training = modeling.TrainingModel(mixtral_config())
    training.load_state_dict(torch.load(work / "checkpoint.pt", weights_only=True)["model"])
    ids, targets = torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:]).reshape(-1)
    with torch.no_grad():
        ours, theirs = training(ids)[0].float(), model(ids).logits.float().flatten(0, 1)
    difference = (ours - theirs).abs()
    losses = [float(torch.nn.functional.cross_entropy(x, targets)) for x in (ours, theirs)]
    return {
        "mean_abs_logit_difference": float(difference.mean()),
        "logit_std": float(theirs.std()),
        "same_argmax": float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
        "loss_training_module": losses[0],
        "loss_exported": losses[1],
    }


def bundled_counts(model: torch.nn.Module, counter: Counter, tokenizer, path: Path) -> np.ndarray:
    """Load on a bundled file, a record a row, cut to 1024 tokens: [L, E]."""
    for record in data.read_rows(path):
        ids = tokenizer(record["text"], truncation=True, max_length=1024, return_tensors="pt").input_ids
        with torch.no_grad():
            model(ids)
    return counter.take()


def replicated(plan: np.ndarray, target: np.ndarray, extra: int) -> np.ndarray:
    """LIS of `target` [L, E] with `extra` replicas a layer given greedily by `plan` [L, E]: [L]."""
    result = []
    for p, t in zip(plan, target, strict=True):
        slots = np.ones(len(p))
        for _ in range(extra):
            slots[np.argmax(p / slots)] += 1
        result.append(len(t) * (t / slots).max() / t.sum())
    return np.array(result)


def validation_baseline(baseline: dict, held: dict, options: dict) -> dict[str, float]:
    """Loss of the 5-gram model on the very windows that `train.validate` scores, a domain."""
    length, limit, result = options["length"], options["validate_windows"], {}
    for d in data.DOMAINS:
        starts = data.window_starts(len(held[d]), length, limit)
        result[d] = float(-baseline[f"ngram_{d}"][starts[:, None] + np.arange(length)].mean())
    return result


def main() -> None:
    """Runs every measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in (
        ("data", "folder of the data files"),
        ("work", "train.py's --out"),
        ("model", "exported checkpoint"),
        ("out", "folder of README.md"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, help=text)
    args = parser.parse_args()
    torch.set_num_threads(1)
    _, train, held = data.prepare(args.data, args.work)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    baseline = cached_baseline(args.work, train, held)
    counter = Counter(model)
    rows, nats, counts = {}, {}, {}
    for d in data.DOMAINS:
        starts = data.window_starts(len(held[d]), 1024, SPANS)
        scored = (starts[:, None] + np.arange(1024)).reshape(-1)  # token t + 1 is scored at position t
        rows[d] = held[d][scored.reshape(-1, 256)[:, :1] + np.arange(257)].astype(np.int64)
        nats[d] = {"model": score(model, rows[d]).reshape(-1)}
        counts[d] = counter.take()
        nats[d]["model_1024"] = score(model, data.windows(held[d], 1024, SPANS)).reshape(-1)
        counter.take()
        for name in ("ngram", "ngram_own_domain"):
            nats[d][name] = baseline[f"{name}_{d}"][scored]
        print(d, {k: round(float(np.exp(-v.mean())), 2) for k, v in nats[d].items()}, flush=True)
    perplexity = {
        d: {"tokens": v["model"].size} | {k: float(np.exp(-x.mean())) for k, x in v.items()} for d, v in nats.items()
    }
    names = ("model", "model_1024", "ngram", "ngram_own_domain")
    perplexity["all scored tokens"] = {"tokens": sum(v["tokens"] for v in perplexity.values())} | {
        k: float(np.exp(-np.concatenate([nats[d][k] for d in data.DOMAINS]).mean())) for k in names
    }
    perplexity["mean over domains"] = {"tokens": perplexity["all scored tokens"]["tokens"]} | {
        k: float(np.exp(-np.mean([nats[d][k].mean() for d in data.DOMAINS]))) for k in names
    }
    for v in perplexity.values():
        v["ratio"] = v["model"] / min(v["ngram"], v["ngram_own_domain"])
    share = min(len(r) for r in rows.values())
    for d in data.DOMAINS:  # pooled: as many windows of each domain
        score(model, rows[d][np.linspace(0, len(rows[d]) - 1, share).astype(int)])
    pooled = counter.take()
    bundle = args.model.parent / "text"
    calibration, heldout = (
        bundled_counts(model, counter, tokenizer, bundle / f"{n}.jsonl.gz") for n in ("calibration", "heldout")
    )
    log = [json.loads(line) for line in (args.work / "log.jsonl").read_text().splitlines()]
    last = [r for r in log if "step" in r][-1]
    train_docs, held_docs = data.load_documents(args.data)
    results = {
        "perplexity": perplexity,
        "ngram_self_check": self_check(),
        "lis": {d: lis(c).tolist() for d, c in counts.items()}
        | {
            "pooled, equal domains": lis(pooled).tolist(),
            "bundled heldout.jsonl.gz": lis(heldout).tolist(),
            "bundled, 1 replica a layer": replicated(calibration, heldout, 1).tolist(),
            "bundled, 2 replicas a layer": replicated(calibration, heldout, 2).tolist(),
            "bundled, 4 replicas a layer": replicated(calibration, heldout, 4).tolist(),
        },
        "counts_pooled": pooled.tolist(),
        "agreement": agreement(model, args.work, rows["wikipedia"][:8]),
        "training": {
            "tokens": last["tokens"],
            "steps": last["step"],
            "seconds": last["seconds"],
            "unique_tokens": sum(len(s) for s in train.values()),
            "options": [r["options"] | {"from_step": r.get("from_step", 0)} for r in log if "options" in r],
            "epochs": {  # tokens drawn from a domain over its unique tokens
                d: last["tokens"] * p / log[0]["train_tokens"][d]
                for d, p in zip(log[0]["domains"], log[0]["sampling"], strict=True)
            },
            "documents": len(train_docs),
            "held_out_documents": len(held_docs),
            "sampling": dict(zip(log[0]["domains"], log[0]["sampling"], strict=True)),
            "train_tokens": log[0]["train_tokens"],
            "router_aux_loss_coef": model.config.router_aux_loss_coef,
        },
        "held_out_overlap": data.overlap(train_docs, held_docs),
        "model": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes": (args.model / "model.safetensors").stat().st_size,
        },
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (args.out / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in thin(log)), encoding="utf-8")
    plot(log, validation_baseline(baseline, held, log[0]["options"]), args.out / "curve.png")
    fill_readme(args.out / "README.md", results)
    print(json.dumps({"perplexity": perplexity["all scored tokens"], "lis": results["lis"]["pooled, equal domains"]}))


def cached_baseline(work: Path, train: dict, held: dict) -> dict[str, np.ndarray]:
    """Log-probabilities of the held-out streams under the 5-gram models, computed once."""
    path = work / "ngram.npz"
    if not path.exists():
        pooled = KneserNey(list(train.values()), data.VOCAB)
        scores = {f"ngram_{d}": pooled.score(held[d]) for d in data.DOMAINS}
        del pooled  # 2 GB
        for d in data.DOMAINS:
            scores[f"ngram_own_domain_{d}"] = KneserNey([train[d]], data.VOCAB).score(held[d])
        np.savez(path.with_name("partial.npz"), **scores)
        path.with_name("partial.npz").rename(path)
    return dict(np.load(path))


if __name__ == "__main__":
    main()
