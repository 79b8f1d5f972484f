"""lm-evaluation-harness on the product's task files, with the answers to one question scored in one row.

The harness asks for log p(answer | context) one answer at a time and repeats the context for each. Here a row is

    context  answer 1  answer 2  ...        positions of an answer go on from the context's;
                                            its tokens see the context and themselves, not the other answers

which is the same computation without the repetition, about half of the work, and the head is applied to the answers'
tokens only. Prompts, tokens, metrics and documents stay the harness's own.

B rows, W tokens of the longest row.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import evaluator

from equipoise.evaluation.harness import load_tasks
from equipoise.evaluation.harness_model import HarnessModel
from equipoise.evaluation.paired import Measure

Request = tuple[tuple[str, str], list[int], list[int]]


class PackedModel(HarnessModel):
    """`HarnessModel` that scores all answers to a context together."""

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, _) in enumerate(requests):
            groups.setdefault(tuple(context), []).append(number)
        rows = sorted(groups.items(), key=lambda row: -len(row[0]) - sum(len(requests[n][2]) for n in row[1]))
        out: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for start in range(0, len(rows), int(self.batch_size)):
            part = rows[start : start + int(self.batch_size)]
            answers = [[requests[n][2] for n in numbers] for _, numbers in part]
            scores = score_rows(self.model, [list(context) for context, _ in part], answers)
            for (_, numbers), values in zip(part, scores, strict=True):
                for number, value in zip(numbers, values, strict=True):
                    out[number] = value
                    self.advance()
        return out


@torch.inference_mode()
def score_rows(model: Any, contexts: list[list[int]], answers: list[list[list[int]]]) -> list[list[tuple[float, bool]]]:
    """Log-likelihood of each answer after its context (nats), and whether it is the likeliest token by token.

    Args:
        model: decoder-only, with `model.model` and `model.lm_head`, and attention that takes a mask.
        contexts: B lists of at least one token.
        answers: for each context its answers, each of at least one token.
    """
    tokens = [context + [t for answer in own for t in answer] for context, own in zip(contexts, answers, strict=True)]
    width = max(map(len, tokens))
    ids = torch.zeros(len(tokens), width, dtype=torch.int64)
    place = torch.zeros_like(ids)
    own = torch.full_like(ids, -1)  # which answer a token belongs to; 0 is the context, -1 padding
    reads, targets, spans = [], [], []
    for row, (context, choices) in enumerate(zip(contexts, answers, strict=True)):
        ids[row, : len(tokens[row])] = torch.tensor(tokens[row])
        place[row, : len(context)] = torch.arange(len(context))
        own[row, : len(context)] = 0
        end = len(context)
        for number, answer in enumerate(choices, 1):
            span = slice(end, end + len(answer))
            place[row, span] = torch.arange(len(context), len(context) + len(answer))
            own[row, span] = number
            before = [len(context) - 1, *range(span.start, span.stop - 1)]
            spans.append((len(targets), len(targets) + len(answer)))
            reads.extend(row * width + position for position in before)
            targets.extend(answer)
            end = span.stop
    device = model.device
    own = own.to(device)
    seen = (own[:, :, None] == own[:, None]) | (own[:, None] == 0)
    seen &= torch.ones(width, width, dtype=torch.bool, device=device).tril()
    seen |= torch.eye(width, dtype=torch.bool, device=device)  # padding sees itself: no row of the softmax is empty
    mask = torch.zeros(seen.shape, dtype=model.dtype, device=device)
    mask = mask.masked_fill(~seen, torch.finfo(model.dtype).min)[:, None]
    hidden = model.model(
        input_ids=ids.to(device), attention_mask=mask, position_ids=place.to(device), use_cache=False
    ).last_hidden_state.flatten(0, 1)
    picked, target = hidden[torch.tensor(reads, device=device)], torch.tensor(targets, device=device)
    value = torch.zeros(len(targets), device=device)
    best = torch.zeros(len(targets), dtype=torch.bool, device=device)
    for start in range(0, len(targets), 256):
        part = slice(start, start + 256)
        logp = model.lm_head(picked[part]).float().log_softmax(-1)
        value[part] = logp.gather(1, target[part, None])[:, 0]
        best[part] = logp.argmax(-1) == target[part]
    value, best = value.cpu(), best.cpu()
    flat = iter([(float(value[a:b].double().sum()), bool(best[a:b].all())) for a, b in spans])
    return [[next(flat) for _ in choices] for choices in answers]


def accuracy(
    loaded: Any, names: Sequence[str], task_data: Path, limit: int, rows: int
) -> dict[str, dict[str, Measure]]:
    """`acc` and `acc_norm` of each task, document by document.

    Args:
        loaded: a `LoadedModel`.
        names: tasks of the product.
        task_data: directory of their rows.
        limit: documents of a task, the first (0 = all).
        rows: questions a forward pass.
    """
    tasks = load_tasks(names, task_data)
    with redirect_stdout(sys.stderr):
        out: Any = evaluator.evaluate(
            lm=PackedModel(loaded, rows), task_dict=tasks, limit=limit or None, bootstrap_iters=0, log_samples=True
        )
    result = {}
    for name in names:
        samples = sorted(out["samples"][name], key=lambda sample: sample["doc_id"])
        ones = np.ones(len(samples))
        result[name] = {
            metric: Measure("share", np.array([float(sample[metric]) for sample in samples]), ones)
            for metric in ("acc", "acc_norm")
        }
    return result
