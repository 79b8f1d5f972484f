"""The scripts of benchmarks/switch, and small models and data for them."""

import json
from pathlib import Path

from script_modules import import_scripts

scripts = import_scripts("switch")

SMALL = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 24}


def small_config(experts: int, **changes):
    return scripts.model.config(experts, **{**SMALL, **changes})


def small_model(experts: int = 4, seed: int = 0):
    return scripts.model.new_model(small_config(experts), seed).eval()


def small_artifact(path: Path, experts: int = 8) -> Path:
    """An artifact of a small untrained model; `build.config` must be `small_config` to read it."""
    weights = dict(small_model(experts).named_parameters())
    scripts.artifact.write(path, weights, {"options": {"experts": experts}})
    return path


def small_wikiqa(directory: Path) -> Path:
    """A directory with 6 training and 5 test questions; the second has two answers, every one a wrong sentence."""
    for split, count in (("dev", 6), ("test", 5)):
        rows = []
        for n in range(count):
            labels = [1, 0, 1] if n == 1 else [0, 1]
            for s, label in enumerate(labels):
                rows.append(
                    {"question_id": f"Q{n}", "question": f"what is number {n} in {split}",
                     "sentence": f"The number {n} is sentence {s} of the {split} file .", "label": label}
                )  # fmt: skip
        (directory / f"wikiqa_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory
