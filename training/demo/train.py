"""Trains the demo model: a 16-expert, 4-layer Mixtral of 7.4 million parameters, on one CPU core.

    python training/demo/train.py --data ../shared/data --out DIR [--resume] [--minutes 45]

The loss is the language-model loss plus `router_aux_loss_coef` (0.001, MixtralConfig's default) times
transformers' own `load_balancing_loss_func`, which pools all layers: nothing else pushes the router, so a layer
may stay as uneven as the text makes it. One exception, in the first tenth of the run: early in training the inputs of a
router have almost all their length in common, whichever expert that direction favours gets every token, and about
half of the others starve in the upper layers before they have learnt anything (seen in a first run). So there each step
removes from the router's rows their component along the mean input; after that the router is left alone.

The learning rate follows the share of the time budget that is used up (warm-up, then cosine), so the run ends on
time whatever else the machine does; a resumed run goes on with the budget that is left. `DIR` gets
`checkpoint.pt` (every few minutes, atomically), `log.jsonl`, and at the end the exported `model/`.

Cost: 54 minutes and 3 GB of memory on one core with bf16 matrix instructions. Starts itself anew with an
allocator that keeps large blocks, which spares a fifth of the time otherwise lost to page faults.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
if __name__ == "__main__" and any(os.environ.get(k) != v for k, v in ALLOCATOR.items()):
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)

import data  # noqa: E402
import model as modeling  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from optim import Muon  # noqa: E402
from transformers import MixtralConfig  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # noqa: E402


@dataclass(frozen=True)
class Options:
    """Every hyper-parameter of the run."""

    minutes: float = 54.0  # time budget, training and validation together
    rows: int = 32  # windows a step
    length: int = 256  # tokens a window; every `long_every`-th step has rows/4 windows of 4*length instead,
    long_every: int = 4  # so that positions up to max_position_embeddings are trained
    muon_lr: float = 0.02
    momentum: float = 0.95
    adam_lr: float = 3e-3
    weight_decay: float = 0.05
    warmup: float = 0.02  # share of the budget
    final_lr: float = 0.02  # share of the peak
    clip: float = 1.0
    centre: float = 0.1  # share of the budget in which routers are kept from reading the mean of their input
    sampling_exponent: float = 0.5
    validate_seconds: float = 150.0
    save_seconds: float = 180.0
    validate_windows: int = 24  # a domain
    seed: int = 20261122


def mixtral_config() -> MixtralConfig:
    """The architecture."""
    return MixtralConfig(
        vocab_size=data.VOCAB,
        hidden_size=256,
        intermediate_size=112,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        num_local_experts=16,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
        sliding_window=None,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        architectures=["MixtralForCausalLM"],
    )


def lis(counts: np.ndarray) -> np.ndarray:
    """Load imbalance score of each layer: counts [L, E] -> [L], E * max / sum."""
    return counts.shape[1] * counts.max(axis=1) / counts.sum(axis=1)


@torch.no_grad()
def validate(model: modeling.TrainingModel, held: dict[str, np.ndarray], options: Options) -> dict:
    """Loss a token of each domain and LIS a layer, pooled over equally many windows of each domain."""
    losses, counts = {}, 0
    experts = model.config.num_local_experts
    for domain in data.DOMAINS:
        ids = torch.from_numpy(data.windows(held[domain], options.length, options.validate_windows))
        logits, _, choices = model(ids[:, :-1])
        loss = modeling.CrossEntropy.apply(logits, ids[:, 1:].reshape(-1))
        losses[domain] = round(float(loss), 4)
        counts = counts + np.stack([np.bincount(c.reshape(-1), minlength=experts) for c in choices])
    return {
        "val_loss": losses,
        "val_mean": round(float(np.mean(list(losses.values()))), 4),
        "lis": [round(float(x), 3) for x in lis(counts)],
    }


def make_optimizers(model: modeling.TrainingModel, options: Options) -> list[torch.optim.Optimizer]:
    """Muon for attention and experts, AdamW for embedding, routers and norms."""
    plain = [getattr(w, name) for w in model.layers for name in ("q", "k", "v", "o", "down")]
    halves = [w.gate_up for w in model.layers]
    norms = [model.norm] + [p for w in model.layers for p in (w.norm1, w.norm2)]
    wide = [model.embed] + [w.router for w in model.layers]
    muon = Muon(
        [{"params": plain}, {"params": halves, "halves": True}], options.muon_lr, options.momentum, options.weight_decay
    )
    adam = torch.optim.AdamW(
        [{"params": wide}, {"params": norms}], lr=options.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def schedule(used: float, options: Options) -> float:
    """Share of the peak learning rate when the share `used` of the budget is gone."""
    if used < options.warmup:
        return max(used / options.warmup, 0.01)
    phase = min((used - options.warmup) / (1 - options.warmup), 1.0)
    return options.final_lr + (1 - options.final_lr) * 0.5 * (1 + math.cos(math.pi * phase))


@dataclass
class Progress:
    """Where the run stands."""

    step: int = 0
    tokens: int = 0
    elapsed: float = 0.0  # seconds of the budget used, over all resumptions
    smooth: float | None = None  # running mean of the loss


class Run:
    """Model, optimizers and position of one training run."""

    def __init__(self, options: Options, out: Path) -> None:
        self.options, self.checkpoint = options, out / "checkpoint.pt"
        self.model = modeling.TrainingModel(mixtral_config())
        self.optimizers = make_optimizers(self.model, options)
        self.at = Progress()

    def save(self) -> None:
        """Writes the checkpoint under a temporary name, then renames it."""
        partial = self.checkpoint.with_suffix(".partial")
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save({"model": self.model.state_dict(), "optimizers": states, **asdict(self.at)}, partial)
        partial.rename(self.checkpoint)

    def load(self) -> None:
        """Goes back to the checkpoint."""
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.at = Progress(**{field: state[field] for field in asdict(self.at) if field in state})

    def train_step(self, batch: torch.Tensor, used: float) -> dict:
        """One update on a batch [B, S + 1] when the share `used` of the budget is gone; returns the log record."""
        factor = schedule(used, self.options)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * factor
        config = self.model.config
        logits, router_logits, _ = self.model(batch[:, :-1])
        loss = modeling.CrossEntropy.apply(logits, batch[:, 1:].reshape(-1))
        balance = load_balancing_loss_func(router_logits, config.num_local_experts, config.num_experts_per_tok)
        (loss + config.router_aux_loss_coef * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if used < self.options.centre:
            for layer in self.model.layers:
                layer.centre_router()
        at, value = self.at, loss.item()
        at.step, at.tokens = at.step + 1, at.tokens + batch[:, 1:].numel()
        at.smooth = value if at.smooth is None else 0.95 * at.smooth + 0.05 * value
        return {
            "step": at.step,
            "tokens": at.tokens,
            "loss": round(at.smooth, 4),
            "balance": round(balance.item(), 4),
            "grad_norm": round(norm.item(), 3),
            "lr": round(factor, 4),
        }


def train_until_done(run: Run, train: dict[str, np.ndarray], held: dict[str, np.ndarray], log: TextIO) -> None:
    """Steps until the time budget is used up; logs, validates and saves on the way."""
    options, at = run.options, run.at
    probabilities = data.sampling_probabilities(train, options.sampling_exponent)
    rng = np.random.default_rng([options.seed, at.step])  # a resumed run draws other windows, not the same again
    start, checked, saved = time.monotonic() - at.elapsed, at.elapsed, at.elapsed
    record: dict = {}
    while (used := (time.monotonic() - start) / (60 * options.minutes)) < 1.0:
        stretch = 4 if at.step % options.long_every == options.long_every - 1 else 1
        rows, length = options.rows // stretch, options.length * stretch
        record = run.train_step(torch.from_numpy(data.sample_batch(train, probabilities, rows, length, rng)), used)
        at.elapsed = time.monotonic() - start
        record["seconds"] = round(at.elapsed, 1)
        if at.elapsed - checked > options.validate_seconds or at.step in (50, 150):
            record |= validate(run.model, held, options)
            checked = at.elapsed
        if "val_loss" in record or at.step % 20 == 0:
            log.write(json.dumps(record) + "\n")
        if at.elapsed - saved > options.save_seconds:
            run.save()
            saved = at.elapsed
    log.write(json.dumps(record | validate(run.model, held, options)) + "\n")
    run.save()


def main() -> None:
    """Runs the training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data files")
    parser.add_argument("--out", type=Path, required=True, help="working directory: cache, checkpoint, log, model")
    parser.add_argument("--resume", action="store_true", help="go on from DIR/checkpoint.pt")
    parser.add_argument("--minutes", type=float, default=Options.minutes, help="time budget in all (%(default)s)")
    args = parser.parse_args()
    options = Options(minutes=args.minutes)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    tokenizer, train, held = data.prepare(args.data, args.out)
    run = Run(options, args.out)
    if args.resume:
        run.load()
    modeling.compile_parts()
    with open(args.out / "log.jsonl", "a" if args.resume else "w", buffering=1, encoding="utf-8") as log:
        sizes = {domain: len(train[domain]) for domain in data.DOMAINS}
        probabilities = data.sampling_probabilities(train, options.sampling_exponent).round(4).tolist()
        header = {"options": asdict(options), "from_step": run.at.step, "domains": data.DOMAINS}
        log.write(json.dumps(header | {"sampling": probabilities, "train_tokens": sizes}) + "\n")
        train_until_done(run, train, held, log)
    modeling.export(run.model, args.out / "model")
    data.save_tokenizer(tokenizer, args.out / "model", run.model.config.max_position_embeddings)


if __name__ == "__main__":
    main()
