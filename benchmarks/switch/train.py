"""Trains a small Switch Transformer as a denoising model, on one thread.

    python benchmarks/switch/train.py --data ../shared/data --work DIR --experts 8 [--minutes 20] [--new-tokenizer]
    python benchmarks/switch/train.py --data ../shared/data --work DIR2 --experts 16 --split DIR/switch8.safetensors

`--split` starts from a model of half the experts, each of which becomes two (model.py). Started again with the same
DIR it goes on where the last checkpoint stands (written every few minutes, atomically). The budget is processor time,
and the learning rate follows the share of it that is used up, so a busy machine takes longer and trains the same. It
leaves the artifact, which build.py makes a Hugging Face directory of, and one line of JSON on stdout.

A step has 10 windows of 128 tokens with spans hidden (`SPANS`) and 12 of 80 tokens to be continued
(`CONTINUATIONS`), as in text.py; its loss is the mean of the two, each that of transformers: cross-entropy, balancing
loss and z-loss. Embeddings start at deviation 1 and matrices at about 0.1,
hence their learning rates: Adam moves every entry by the rate, and both should move by like shares of themselves.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import artifact
import numpy as np
import text
import torch
from model import EXPERTS, config, new_model, split_experts
from safetensors import safe_open
from safetensors.torch import save_file

from equipoise.errors import InputError
from equipoise.files.atomic import atomic_file

SPANS: dict[str, int] = {
    "wikipedia": 2, "wikitext": 1, "questions": 1, "fiction": 1, "web": 1,
    "code": 1, "biomedical": 1, "legal": 1, "maths": 1,
}  # fmt: skip
"""Windows of each stream in a step, spans hidden."""
CONTINUATIONS: dict[str, int] = {"wikipedia": 4, "wikitext": 2, "questions": 2, "fiction": 1, "web": 2, "biomedical": 1}
"""Windows of each stream in a step, to be continued."""
STEP_TOKENS = sum(SPANS.values()) * text.WINDOW + sum(CONTINUATIONS.values()) * (text.PREFIX + text.CONTINUATION)


@dataclass(frozen=True)
class Options:
    """Every hyper-parameter of the run."""

    experts: int
    minutes: float = 20.0
    embedding_lr: float = 2e-2
    lr: float = 3e-3
    warmup: float = 0.03
    final_lr: float = 0.02
    clip: float = 1.0
    save_seconds: float = 180.0
    validate_seconds: float = 600.0
    validate_windows: int = 8
    seed: int = 20261125


def prepare(directory: Path, work: Path) -> dict[str, np.ndarray]:
    """Tokens of every stream, held out and not; read back when they exist."""
    path = work / "tokens.npz"
    if not path.exists():
        tokenizer = text.load_tokenizer()
        parts = {
            f"{stream}.{'held' if held else 'train'}": text.tokenized(directory, tokenizer, stream, held)
            for stream in text.STREAMS
            for held in (False, True)
        }
        with atomic_file(path) as partial, partial.open("wb") as file:
            np.savez(file, **parts)  # type: ignore[arg-type]
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


Batch = tuple[torch.Tensor, torch.Tensor]
"""Inputs and targets, int64 [rows, input length] and [rows, target length]."""


def batches(tokens: dict[str, np.ndarray], step: int, seed: int) -> tuple[Batch, Batch]:
    """What a step trains on: spans hidden [10, 116] and [10, 26], continuations [12, 26] and [12, 57].

    A pure function of the step.
    """
    hidden, continued = [], []
    for place, (stream, count) in enumerate(SPANS.items()):
        for n in range(step * count, (step + 1) * count):
            window = text.training_window(tokens[f"{stream}.train"], text.WINDOW, n, (seed, place))
            hidden.append((window, (seed, place, n)))
    length = text.PREFIX + text.CONTINUATION
    for place, (stream, count) in enumerate(CONTINUATIONS.items(), start=len(SPANS)):
        for n in range(step * count, (step + 1) * count):
            continued.append(text.training_window(tokens[f"{stream}.train"], length, n, (seed, place)))
    return _tensors(text.corrupted_batch(hidden)), _tensors(text.continued_batch(continued))


def _tensors(pair: tuple[np.ndarray, np.ndarray]) -> Batch:
    return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])


@torch.no_grad()
def validate(model: Any, tokens: dict[str, np.ndarray], options: Options) -> dict[str, float]:
    """Cross-entropy on held-out windows, nats a target token: spans by stream, their mean, Wikipedia continued."""
    model.eval()

    def loss(batch: Batch) -> float:
        return float(model(input_ids=batch[0], labels=batch[1]).loss)

    losses = {}
    for place, stream in enumerate(SPANS):
        windows = text.held_out_windows(tokens[f"{stream}.held"], text.WINDOW, options.validate_windows)
        losses[stream] = loss(_tensors(text.corrupted_batch((w, (7, place, n)) for n, w in enumerate(windows))))
    length = text.PREFIX + text.CONTINUATION
    windows = text.held_out_windows(tokens["wikipedia.held"], length, 2 * options.validate_windows)
    said = {**losses, "spans": sum(losses.values()) / len(losses), "continuation": loss(_tensors(
        text.continued_batch(windows)))}  # fmt: skip
    model.train()
    return {name: round(value, 4) for name, value in said.items()}


def start_from(model: Any, path: Path, seed: int) -> dict[str, Any]:
    """Give the model the weights of an artifact with half its experts, and return what that says about itself."""
    weights, about = artifact.read(path)
    left = model.load_state_dict(split_experts(weights, seed), strict=False)
    if left.unexpected_keys or any("expert" in name or "router" in name for name in left.missing_keys):
        raise InputError(f"{path} does not have half of {model.config.num_experts} experts")
    return about


def no_dropout(model: Any) -> None:
    """Without dropout, which the configuration keeps for fine-tuning: hardly a token is seen twice here."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif type(module).__name__ == "SwitchTransformersAttention":
            module.dropout = 0.0


def optimizer_for(model: Any, options: Options) -> torch.optim.AdamW:
    """AdamW with the embeddings' own learning rate."""
    embedding = [model.shared.weight]
    others = [p for p in model.parameters() if p is not model.shared.weight]
    groups = [{"params": embedding, "lr": options.embedding_lr}, {"params": others, "lr": options.lr}]
    for group in groups:
        group["peak"] = group["lr"]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)


def rate(share: float, options: Options) -> float:
    """Learning rate as a part of its peak, at a share of the budget."""
    if share < options.warmup:
        return max(share / options.warmup, 0.01)
    done = min((share - options.warmup) / (1 - options.warmup), 1.0)
    return options.final_lr + (1 - options.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


def train(model: Any, tokens: dict[str, np.ndarray], work: Path, options: Options) -> int:
    """Run to the end of the budget, from the checkpoint where there is one. Returns the number of steps."""
    optimizer = optimizer_for(model, options)
    step, used = restore(work, model, optimizer)
    begin = time.process_time() - used
    saved = validated = time.monotonic()
    budget = options.minutes * 60
    recent: list[list[tuple[float, float, float]]] = []
    while (used := time.process_time() - begin) < budget:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(used / budget, options)
        parts = []
        for inputs, targets in batches(tokens, step, options.seed):
            out = model(input_ids=inputs, labels=targets, output_router_logits=True)
            (out.loss / 2).backward()
            parts.append((out.loss.item(), out.encoder_aux_loss.item(), out.decoder_aux_loss.item()))
        if not np.isfinite(parts).all():
            raise InputError(f"the loss is not finite at step {step}: lower the learning rates")
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        recent.append(parts)
        if step % 25 == 0:
            spans, continuation = np.mean(recent, 0)
            note(work, {"step": step, "seconds": round(used), "spans": round(spans[0], 4),
                        "continuation": round(continuation[0], 4),
                        "balance": [round(b, 3) for b in (*spans[1:], *continuation[1:])]})  # fmt: skip
            recent.clear()
        if time.monotonic() - saved > options.save_seconds:
            save(work, model, optimizer, step, time.process_time() - begin)
            saved = time.monotonic()
        if time.monotonic() - validated > options.validate_seconds:
            note(work, {"step": step, "seconds": round(used), "held_out": validate(model, tokens, options)})
            validated = time.monotonic()
    save(work, model, optimizer, step, used)
    return step


def save(work: Path, model: Any, optimizer: torch.optim.AdamW, step: int, seconds: float) -> None:
    """The checkpoint: weights and both moments, whole or not at all."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        state = optimizer.state[parameter]
        if state:  # an expert that never got a token has none
            tensors[f"first.{name}"], tensors[f"second.{name}"] = state["exp_avg"], state["exp_avg_sq"]
    with atomic_file(work / "checkpoint.safetensors") as partial:
        save_file(tensors, partial, metadata={"step": str(step), "seconds": str(seconds)})
    print(f"checkpoint at step {step}", file=sys.stderr, flush=True)


def restore(work: Path, model: Any, optimizer: torch.optim.AdamW) -> tuple[int, float]:
    """Read the checkpoint back, if there is one: steps done and seconds used."""
    path = work / "checkpoint.safetensors"
    if not path.exists():
        return 0, 0.0
    with safe_open(path, "pt") as file, torch.no_grad():
        step, seconds = int(file.metadata()["step"]), float(file.metadata()["seconds"])
        names = set(file.keys())
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"weight.{name}"))
            if f"first.{name}" in names:
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": file.get_tensor(f"first.{name}"),
                    "exp_avg_sq": file.get_tensor(f"second.{name}"),
                }
    return step, seconds


def note(work: Path, entry: dict[str, Any]) -> None:
    """One line of the log, also on stderr."""
    with (work / "log.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
    print(json.dumps(entry), file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of the text files")
    parser.add_argument("--work", type=Path, required=True, help="everything of the run")
    parser.add_argument("--experts", type=int, choices=EXPERTS, default=8)
    parser.add_argument("--minutes", type=float, default=Options.minutes, help="processor time of training")
    parser.add_argument("--split", type=Path, help="artifact of a model with half the experts to start from")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokenizer", action="store_true", help="train tokenizer.json anew and stop")
    arguments = parser.parse_args()
    if arguments.new_tokenizer:
        tokenizer = text.train_tokenizer(text.tokenizer_texts(arguments.data))
        with atomic_file(text.TOKENIZER) as partial:
            tokenizer.save(str(partial), pretty=False)
        print(json.dumps({"tokenizer": text.TOKENIZER.name, "entries": tokenizer.get_vocab_size()}))
        return
    torch.set_num_threads(arguments.threads)
    options = Options(arguments.experts, arguments.minutes)
    arguments.work.mkdir(parents=True, exist_ok=True)
    tokens = prepare(arguments.data, arguments.work)
    model = new_model(config(options.experts), options.seed).train()
    before = start_from(model, arguments.split, options.seed) if arguments.split else {}
    no_dropout(model)
    steps = train(model, tokens, arguments.work, options)
    held = validate(model, tokens, options)
    note(arguments.work, {"step": steps, "held_out": held})
    about = {"steps": steps, "tokens": steps * STEP_TOKENS, "held_out": held,
             "split": before, "options": asdict(options)}  # fmt: skip
    weights = dict(model.named_parameters())
    artifact.write(arguments.work / artifact.path_of(options.experts).name, weights, about)
    print(json.dumps(about))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
