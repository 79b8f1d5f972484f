"""Builds a small Switch Transformer from its artifact: a plain Hugging Face directory, in seconds, from this folder.

    python benchmarks/switch/build.py --experts 8 --out switch8

Writes float32 weights and the tokenizer; `AutoModelForSeq2SeqLM.from_pretrained` and `equipoise` read it. The last
stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import artifact
import text
from model import EXPERTS, config
from transformers import SwitchTransformersForConditionalGeneration

from equipoise.errors import InputError
from equipoise.files.atomic import atomic_directory, require_destination


def original(path: Path) -> tuple[Any, dict[str, Any]]:
    """The trained model in evaluation mode, and what the artifact says about it.

    Raises:
        InputError: there is no artifact, or it does not fit the model.
    """
    weights, about = artifact.read(path)
    model = SwitchTransformersForConditionalGeneration(config(about["options"]["experts"]))
    left = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    strange = [*left.unexpected_keys, *(name for name in left.missing_keys if name not in tied)]
    if strange:
        raise InputError(f"{path} does not fit the model of model.py: {strange[0]}; train it again")
    return model.eval(), about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, choices=EXPERTS, default=8)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--artifact", type=Path, help="other than the repository's")
    parser.add_argument("--force", action="store_true", help="replace what exists")
    arguments = parser.parse_args()
    begin = time.monotonic()
    require_destination(arguments.out, arguments.force)
    model, about = original(arguments.artifact or artifact.path_of(arguments.experts))
    with atomic_directory(arguments.out, arguments.force) as partial:
        model.save_pretrained(partial)
        text.load_tokenizer().save_pretrained(partial)
    size = sum(p.numel() for p in model.parameters())
    print(f"{arguments.out}: {size / 1e6:.1f} M parameters, {model.config.num_experts} experts, top-1")
    result = {"out": str(arguments.out), "parameters": size, "trained": about}
    print(json.dumps({**result, "seconds": round(time.monotonic() - begin, 1)}))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
