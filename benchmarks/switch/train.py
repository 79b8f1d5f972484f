"""Trains a small Switch Transformer as a denoising model, on one thread or on a CUDA device.

    python benchmarks/switch/train.py --data ../shared/data --work DIR --experts 8 [--minutes 20] [--new-tokenizer]
    python benchmarks/switch/train.py --data ../shared/data --work DIR2 --experts 16 --split DIR/switch8.safetensors
    python benchmarks/switch/train.py --data ../shared/data --work DIR --prepare        # tokens only, then elsewhere:
    python benchmarks/switch/train.py --work DIR --experts 8 --device cuda --minutes 3.3 [--scale 8]

`--split` starts from a model of half the experts, each of which becomes two (model.py). Started again with the same
DIR it goes on where the last checkpoint stands (written every few minutes, atomically). The budget is processor time
(wall time on a CUDA device, whose work the processor's clock does not see), and the learning rate follows the share of
it that is used up, so a busy machine takes longer and trains the same. It leaves the artifact, which build.py makes a
Hugging Face directory of, and one line of JSON on stdout.

A step has 10 windows of 128 tokens with spans hidden (mixture.py, `SPANS`) and 12 of 80 tokens to be continued
(`CONTINUATIONS`), as in text.py; its loss is the mean of the two, each that of transformers: cross-entropy, balancing
loss and z-loss. Embeddings start at deviation 1 and matrices at about 0.1,
hence their learning rates: Adam moves every entry by the rate, and both should move by like shares of themselves.

`--scale N` (8 on a CUDA device) has N times these windows and a third part, pairs in the form of the task (feed.py),
with all experts computed at once (dense.py). Products are TF32 on a CUDA device, whose 10 bits also hold for routers;
bfloat16 autocast would round router inputs to 7 bits and add a cast to every operation of a model that waits for
launches, not for arithmetic.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import artifact
import dense
import devices
import feed
import numpy as np
import text
import torch
from mixture import SPANS, STEP_TOKENS, batches, named, prepare, scaled_batches, tensors
from model import EXPERTS, config, new_model, split_experts
from saving import note, restore, save

from equipoise.errors import InputError
from equipoise.files.atomic import atomic_file

SCALE = 8
"""Times the windows of a step on a CUDA device."""


@dataclass(frozen=True)
class Options:
    """Every hyper-parameter of the run.

    Attributes:
        scale: times the windows of a step, with pairs in the form of the task; 0: the windows alone, as they are.
        rate: multiplies both learning rates. `scale ** 0.5` is the usual rule for Adam and a larger batch; the
            rates are high already, so the default leaves them.
    """

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
    scale: int = 0
    rate: float = 1.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least in (("minutes", 0.0), ("rate", 0.0), ("scale", 0)):
            if not math.isfinite(value := getattr(self, name)) or value < least:
                raise InputError(f"--{name} {value}: give {least} or more")

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, padding of pairs included."""
        return self.scale * (STEP_TOKENS + feed.PAIR_TOKENS) or STEP_TOKENS


def steps(tokens: dict[str, np.ndarray], first: int, options: Options) -> Iterator[list[feed.Batch]]:
    """What each step trains on, from step `first` on: on the device, for a CUDA device made ahead in a thread."""
    device = devices.device_of(options.device)
    chance = feed.chances(tokens) if options.scale else np.ones(0)

    def make(step: int) -> list[feed.Batch]:
        if not options.scale:
            return [named(pair) for pair in batches(tokens, step, options.seed)]
        return scaled_batches(tokens, step, options.seed, options.scale, chance)

    def pinned(step: int) -> list[feed.Batch]:
        return [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in make(step)]

    made = map(make, count(first)) if device.type == "cpu" else feed.ahead(pinned, first)
    return ([devices.moved(batch, device) for batch in step] for step in made)


@torch.no_grad()
def validate(model: Any, tokens: dict[str, np.ndarray], options: Options) -> dict[str, float]:
    """Cross-entropy on held-out windows, nats a target token: spans by stream, their mean, Wikipedia continued.

    With a scale also pairs in the form of the task.
    """
    model.eval()

    def loss(batch: feed.Batch) -> float:
        return float(model(**devices.moved(batch, model.device)).loss)

    losses = {}
    for place, stream in enumerate(SPANS):
        windows = text.held_out_windows(tokens[f"{stream}.held"], text.WINDOW, options.validate_windows)
        hidden = text.corrupted_batch((w, (7, place, n)) for n, w in enumerate(windows))
        losses[stream] = loss(named(tensors(hidden)))
    length = text.PREFIX + text.CONTINUATION
    windows = text.held_out_windows(tokens["wikipedia.held"], length, 2 * options.validate_windows)
    said = {**losses, "spans": sum(losses.values()) / len(losses)}
    said["continuation"] = loss(named(tensors(text.continued_batch(windows))))
    if options.scale:
        said["pairs"] = loss(feed.asked(tokens, "held", options.validate_windows, feed.chances(tokens), (7,)))
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
    groups = [
        {"params": embedding, "lr": options.embedding_lr * options.rate},
        {"params": others, "lr": options.lr * options.rate},
    ]
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
    """Run to the end of the budget, from the checkpoint where there is one. Returns the number of steps.

    Raises:
        InputError: a loss was not finite (looked at every 25 steps, so that a device is not waited for at each one,
            and before anything is saved).
    """
    optimizer = optimizer_for(model, options)
    step, used = restore(work, model, optimizer)
    clock = time.process_time if options.device == "cpu" else time.monotonic
    begin = clock() - used
    saved = validated = time.monotonic()
    budget = options.minutes * 60
    recent: list[torch.Tensor] = []
    if used >= budget:
        return step
    source = steps(tokens, step, options)
    while (used := clock() - begin) < budget:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(used / budget, options)
        parts = next(source)
        losses = []
        for batch in parts:
            out = model(**batch, output_router_logits=True)
            (out.loss / len(parts)).backward()
            losses.append(torch.stack([out.loss, out.encoder_aux_loss, out.decoder_aux_loss]).detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        recent.append(torch.stack(losses))
        if step % 25 == 0:
            mean = finite(recent, step)
            names = ("spans", "continuation", "pairs")
            said = {name: round(float(row[0]), 4) for name, row in zip(names, mean, strict=False)}
            balance = [round(float(value), 3) for row in mean for value in row[1:]]
            note(work, {"step": step, "seconds": round(used), **said, "balance": balance})
            recent.clear()
        if time.monotonic() - saved > options.save_seconds:
            finite(recent, step)
            save(work, model, optimizer, step, clock() - begin)
            saved = time.monotonic()
        if time.monotonic() - validated > options.validate_seconds:
            note(work, {"step": step, "seconds": round(used), "held_out": validate(model, tokens, options)})
            validated = time.monotonic()
    finite(recent, step)
    save(work, model, optimizer, step, used)
    return step


def finite(recent: list[torch.Tensor], step: int) -> np.ndarray:
    """Mean of the losses of recent steps: float64 [parts, 3] of loss and the balancing losses of both stacks.

    Raises:
        InputError: one is not finite.
    """
    if not recent:
        return np.zeros((0, 3))
    found = torch.stack(recent).double().cpu().numpy()
    if not np.isfinite(found).all():
        raise InputError(f"the loss is not finite at step {step} or shortly before: lower the learning rates")
    mean: np.ndarray = found.mean(0)
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory of the text files; not needed when DIR has the tokens")
    parser.add_argument("--work", type=Path, required=True, help="everything of the run")
    parser.add_argument("--experts", type=int, choices=EXPERTS, default=8)
    parser.add_argument(
        "--minutes", type=float, default=Options.minutes,
        help="budget of training: processor time on the processor, wall time on a CUDA device",
    )  # fmt: skip
    parser.add_argument("--split", type=Path, help="artifact of a model with half the experts to start from")
    parser.add_argument("--device", choices=devices.NAMES, default=Options.device)
    parser.add_argument(
        "--scale", type=int, help="times the windows of a step, and pairs of the task (default: 8 with cuda, else 0: "
        "the windows as they are, no pairs)",
    )  # fmt: skip
    parser.add_argument("--rate", type=float, default=Options.rate, help="multiplies the learning rates")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prepare", action="store_true", help="write the tokens into DIR and stop")
    parser.add_argument("--new-tokenizer", action="store_true", help="train tokenizer.json anew and stop")
    arguments = parser.parse_args()
    if arguments.new_tokenizer:
        if arguments.data is None:
            raise InputError("--new-tokenizer needs --data DIR with the text files")
        tokenizer = text.train_tokenizer(text.tokenizer_texts(arguments.data))
        with atomic_file(text.TOKENIZER) as partial:
            tokenizer.save(str(partial), pretty=False)
        print(json.dumps({"tokenizer": text.TOKENIZER.name, "entries": tokenizer.get_vocab_size()}))
        return
    torch.set_num_threads(arguments.threads)
    device = devices.device_of(arguments.device)
    on_cuda = device.type == "cuda"
    scale = arguments.scale if arguments.scale is not None else SCALE if on_cuda else 0
    options = Options(
        arguments.experts, arguments.minutes, scale=scale, rate=arguments.rate, device=arguments.device,
        **({"save_seconds": 60.0, "validate_seconds": 60.0} if on_cuda else {}),
    )  # fmt: skip
    arguments.work.mkdir(parents=True, exist_ok=True)
    tokens = prepare(arguments.data, arguments.work)
    if arguments.prepare:
        print(json.dumps({"prepared": {name: list(ids.shape) for name, ids in tokens.items()}}))
        return
    model = new_model(config(options.experts), options.seed).train()
    before = start_from(model, arguments.split, options.seed) if arguments.split else {}
    no_dropout(model)
    if scale:
        dense.all_at_once(model)
    if on_cuda:
        torch.set_float32_matmul_precision("high")  # TF32
    done = train(model.to(device), tokens, arguments.work, options)
    held = validate(model, tokens, options)
    note(arguments.work, {"step": done, "held_out": held})
    about = {"steps": done, "tokens": done * options.step_tokens, "held_out": held,
             "split": before, "options": asdict(options)}  # fmt: skip
    weights = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    artifact.write(arguments.work / artifact.path_of(options.experts).name, weights, about)
    print(json.dumps(about))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
