"""Fine-tunes a small Switch Transformer on WikiQA by one strategy and measures it; every result is kept.

    AdamW 5e-5, weight decay 0.01, batch 8, 10 epochs (R&Q, section 5), loss of transformers with the balancing loss

    python benchmarks/switch/finetune.py --data ../shared/data --work DIR --experts 8 --strategy "tune router"

A result is a JSON file in the work directory, named by what was asked and by a hash over everything that it depends
on: weights, tokenizer, pairs, options, strategy, versions. A run that was stopped goes on with the strategies that are
not there yet. Weights of the fully fine-tuned model are kept too, for R&Q on top of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import artifact
import devices
import numpy as np
import strategies
import task
import text
import torch
import transformers
from build import original
from model import EXPERTS
from safetensors.torch import load_file, save_file

from equipoise.errors import InputError
from equipoise.files.atomic import atomic_file
from equipoise.types import FloatArray, IntArray

KEPT = "full"
"""The strategy whose weights are kept."""


@dataclass(frozen=True)
class Options:
    """The hyper-parameters of Table 1, and how much of the task is used.

    Attributes:
        pairs: training pairs at most, spread evenly over the dev file (0 = all 140). 64 keep the whole table within
            a few minutes of one thread; the number of epochs is the paper's.
        questions: test questions at most, spread evenly (0 = all 243).
        device: of training and answering, `cpu` or `cuda`.
    """

    lr: float = 5e-5
    weight_decay: float = 0.01
    batch: int = 8
    epochs: int = 10
    pairs: int = 64
    questions: int = 0
    seed: int = 20261125
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.pairs < 0:
            raise InputError(f"--pairs {self.pairs}: give a number of training pairs, or 0 for all of them")


QUICK = Options(epochs=2, pairs=24, questions=24)
"""Enough to see that everything runs."""


def options_of(quick: bool, pairs: int | None, device: str) -> Options:
    """Options of a command line; `pairs` None: as many as there are by default."""
    options = replace(QUICK if quick else Options(), device=devices.device_of(device).type)
    return options if pairs is None else replace(options, pairs=pairs)


@dataclass(frozen=True)
class Task:
    """WikiQA as far as it is used."""

    train: list[task.Question]
    pairs: list[tuple[str, str]]
    test: list[task.Question]


@dataclass(frozen=True)
class Measured:
    """What is known of one model on the test questions.

    Attributes:
        load: int64 [windows, L, E], selections of experts.
        slots: L arrays int64 [windows, S_l], selections of slots; those of experts where there is no plan.
        f1: float64 [questions].
        answers: what the model said.
        about: seconds, losses, tokens and the like.
    """

    load: IntArray
    slots: list[IntArray]
    f1: FloatArray
    answers: list[str]
    about: dict[str, Any] = field(default_factory=dict)


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` items, evenly spread; all of them for 0."""
    if not most or most >= len(items):
        return list(items)
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, most).round()]


def read_task(directory: Path, options: Options) -> Task:
    """The pairs that are trained on and the questions that are scored."""
    train = task.read(directory, "dev")
    return Task(
        train, spread(task.pairs(train), options.pairs), spread(task.read(directory, "test"), options.questions)
    )


def measure(model: Any, work: Task, tokenizer: Any, about: dict[str, Any] | None = None) -> Measured:
    """Load and F1 on the test questions."""
    load, slots = task.load_of(model, list(task.forced(task.pairs(work.test), tokenizer)))
    answers = task.answer(model, work.test, tokenizer)
    return Measured(load, slots, task.f1(answers, work.test), answers, about or {})


def batches(count: int, options: Options) -> Iterator[tuple[int, int, list[int]]]:
    """(epoch, batch over the whole run, numbers of its pairs), each epoch in another order; short batches too."""
    number = 0
    for epoch in range(options.epochs):
        order = np.random.default_rng([options.seed, epoch]).permutation(count)
        for n in range(0, count, options.batch):
            yield epoch, number, [int(i) for i in order[n : n + options.batch]]
            number += 1


def tune(model: Any, how: strategies.Strategy, work: Task, tokenizer: Any, options: Options) -> dict[str, Any]:
    """Fine-tune in place. Returns the mean loss of each epoch, seconds, and what was trained."""
    torch.manual_seed(options.seed)
    begin = time.monotonic()
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(named.values(), lr=options.lr, weight_decay=options.weight_decay, fused=True)
    losses: list[list[float]] = [[] for _ in range(options.epochs)]
    trained: set[str] = set()
    model.train()
    for epoch, number, chosen in batches(len(work.pairs), options):
        for name, parameter in named.items():
            parameter.requires_grad_(how.trains(name, epoch, number, options.epochs))
            if parameter.requires_grad:
                trained.add(name)
        questions, answers = zip(*(work.pairs[i] for i in chosen), strict=True)
        batch = {**task.inputs_of(questions, tokenizer), "labels": task.targets_of(answers, tokenizer)}
        out = model(**devices.moved(batch, model.device), output_router_logits=True)
        out.loss.backward()
        optimizer.step()  # what has no gradient is left alone, weight decay included
        optimizer.zero_grad()
        losses[epoch].append(out.loss.item())
    for parameter in named.values():
        parameter.requires_grad_(True)
    model.eval()
    return {
        "losses": [round(float(np.mean(epoch)), 4) for epoch in losses],
        "seconds": round(time.monotonic() - begin, 1),
        "trained": int(sum(named[name].numel() for name in trained)),
    }


def key(path: Path, work: Task, options: Options, what: str) -> str:
    """Hash over everything a result depends on, 12 hexadecimal digits. The processor is not named, as it was not."""
    chosen = {name: value for name, value in asdict(options).items() if (name, value) != ("device", "cpu")}
    said = {
        "weights": hashlib.sha256(path.read_bytes()).hexdigest(),
        "tokenizer": hashlib.sha256(text.TOKENIZER.read_bytes()).hexdigest(),
        "train": work.pairs, "test": [[q.text, q.answers] for q in work.test],
        "options": chosen, "what": what, "lengths": [task.INPUT, task.TARGET, task.ROWS, task.NO_REPEAT],
        "versions": [torch.__version__, transformers.__version__],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def cached(work: Path, name: str, make: Any) -> Measured:
    """The result in `<work>/<name>.json`, made when it is not there."""
    path = work / f"{name}.json"
    if path.exists():
        said = json.loads(path.read_text(encoding="utf-8"))
    else:
        work.mkdir(parents=True, exist_ok=True)
        found: Measured = make()
        said = {
            "load": found.load.tolist(), "slots": [s.tolist() for s in found.slots], "f1": found.f1.tolist(),
            "answers": found.answers, "about": found.about,
        }  # fmt: skip
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(said), encoding="utf-8")
        print(f"{name}: F1 {found.f1.mean():.4f}, {found.about}", file=sys.stderr, flush=True)
    return Measured(
        np.array(said["load"]), [np.array(s) for s in said["slots"]], np.array(said["f1"]), said["answers"],
        said["about"],
    )  # fmt: skip


def fine_tuned(
    path: Path, how: strategies.Strategy, found: Task, tokenizer: Any, options: Options, work: Path
) -> Measured:
    """A strategy's result: from the work directory, or by fine-tuning the model of an artifact."""
    hashed = key(path, found, options, how.name)
    name = f"{path.stem}-{how.name.replace(' ', '-').replace('%', 'percent')}-{hashed}"

    def make() -> Measured:
        model = original(path)[0].to(options.device)
        about = tune(model, how, found, tokenizer, options)
        if how.name == KEPT:
            with atomic_file(work / f"{name}.safetensors") as partial:
                save_file({k: v.detach().cpu() for k, v in model.named_parameters()}, partial)
        return measure(model, found, tokenizer, about)

    return cached(work, name, make)


def fully_fine_tuned(path: Path, found: Task, tokenizer: Any, options: Options, work: Path) -> Any:
    """The model of the strategy `full`, fine-tuned now when it has not been."""
    hashed = key(path, found, options, KEPT)
    kept = work / f"{path.stem}-{KEPT}-{hashed}.safetensors"
    if not kept.exists():
        (work / f"{path.stem}-{KEPT}-{hashed}.json").unlink(missing_ok=True)
        fine_tuned(path, strategies.strategy(KEPT), found, tokenizer, options, work)
    model, _ = original(path)
    with torch.no_grad():
        named = dict(model.named_parameters())
        for name, weight in load_file(kept).items():
            named[name].copy_(weight)
    return model.to(options.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="holds wikiqa_dev and wikiqa_test")
    parser.add_argument("--work", type=Path, required=True, help="results are kept there")
    parser.add_argument("--experts", type=int, choices=EXPERTS, default=8)
    parser.add_argument("--strategy", required=True, help=", ".join(s.name for s in strategies.STRATEGIES))
    parser.add_argument("--quick", action="store_true", help="24 pairs, 24 questions, two epochs")
    parser.add_argument("--pairs", type=int, help="training pairs at most, 0 for all (default: 64, quick 24)")
    parser.add_argument("--device", choices=devices.NAMES, default=Options.device)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    how = strategies.strategy(arguments.strategy)
    options = options_of(arguments.quick, arguments.pairs, arguments.device)
    found = read_task(arguments.data, options)
    path = artifact.path_of(arguments.experts)
    result = fine_tuned(path, how, found, text.load_tokenizer(), options, arguments.work)
    print(json.dumps({"strategy": how.name, "f1": float(result.f1.mean()), **result.about}))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
