"""Text that the dense model writes itself: on it the mixture is taught to predict what the dense model predicts.

The seven domains would pull the mixture towards their style, and what the dense model knows beyond them would fade.
Its own samples are the cheapest text that covers what it can do: no data set of instructions or common sense is
needed, and no evaluation item can slip in. Openings below only set the kind of text.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

OPENINGS = (
    "", "The", "A", "In", "When", "To", "How to", "It is", "There are", "Once upon a time",
    "Question: How do you", "Question: What is the best way to", "Question: To", "Question: How can I",
    "Question: What is", "Question: Why does", "Question: Which of the following", "Question: What happens when",
    "Question: How does", "Question: Where would you find",
    "A man is", "A woman is", "People are", "The boy", "The girl", "Two men are", "A group of people", "She is",
    "He is shown", "The camera", "A person is", "The athlete", "A close up of", "The team", "Cooking:",
    "Home and garden:", "Health:", "Sports:", "Food and drink: How to make", "Personal care: How to", "Travel: How to",
    "Work: How to", "Pets: How to", "Computers: How to", "Education: How to", "Finance: How to", "Family: How to",
    "First,", "Before you start,", "Use a", "Put the", "You will need", "If you want to", "Make sure that",
    "Plants", "Animals", "The Earth", "Water", "Energy", "Scientists", "The human body", "Heat", "Light", "Weather",
)  # fmt: skip


@torch.inference_mode()
def own_samples(
    dense: Any, tokenizer: Any, passes: int, length: int, seed: int, at_once: int = 1
) -> npt.NDArray[np.int64]:
    """Samples of the dense model (temperature 0.9, among the 50 likeliest tokens), `passes` for each opening.

    Args:
        dense: the dense model.
        tokenizer: its tokenizer.
        passes: samples for each opening.
        length: tokens of a sample.
        seed: of the draws.
        at_once: passes that are written together.

    Returns:
        int64 [passes * openings, length]; where the model ended a text, it begins another after the end-of-text token.
    """
    torch.manual_seed(seed)
    out = []
    starts = [[0, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in OPENINGS]
    longest = max(map(len, starts))
    rows = torch.tensor([[0] * (longest - len(ids)) + ids for ids in starts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in starts])
    for first in range(0, passes, at_once):
        again = min(at_once, passes - first)
        written = dense.generate(
            input_ids=rows.repeat(again, 1).to(dense.device), attention_mask=mask.repeat(again, 1).to(dense.device),
            max_length=length + longest, do_sample=True, temperature=0.9, top_p=1.0, top_k=50, eos_token_id=None,
            pad_token_id=0, suppress_tokens=[1, 2],
        ).cpu()  # fmt: skip
        for row, ids in zip(written, starts * again, strict=True):
            begin = longest - len(ids) + 1  # the opening itself: tasks are read without an end-of-text before them
            out.append(row[begin : begin + length])
    return torch.stack(out).numpy()
