"""The paper's adversarial stream on a model: how the policies fare when the text is chosen against the balance.

    python benchmarks/streaming/adversarial.py [--model demo] [--data ../shared/data/mmlu_test.jsonl.gz] [--sequences N]

Every document (an MMLU question with its choices) runs through the model once; from the same counts the stream is cut
for several shares of kept documents: 1 keeps all of them, which is the text as it is. Ten time steps, R = E/4 spare
slots a layer, the first step places and is not scored. `hit` is the share of selections that go to the heavy hitters,
mean over the kept documents and layers. The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from equipoise.models.loading import load_model
from equipoise.pipeline.stream_text import adversarial_text
from equipoise.pipeline.versions import made_with
from equipoise.streaming import (
    POLICIES,
    Replay,
    adversarial_stream,
    choose_adversarial,
    read_documents,
    replay,
)
from equipoise.streaming.options import TextOptions

KEEP = (0.05, 0.1, 0.2, 0.5, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mmlu_test.jsonl.gz"))
    parser.add_argument("--sequences", type=int, default=0, help="documents, spread evenly over the text (0 = all)")
    arguments = parser.parse_args()
    if not arguments.data.is_file():
        sys.exit(f"no text at {arguments.data}: give --data FILE with multiple-choice questions or documents")
    loaded = load_model(arguments.model)
    records = read_documents([arguments.data], by_domain=True)
    begin = time.perf_counter()
    options = TextOptions(sequences=arguments.sequences)
    _, _, counts = adversarial_text(loaded.model, loaded.tokenizer, records, options)
    spent = time.perf_counter() - begin
    replicas = max(1, counts.shape[2] // 4)
    print(f"{arguments.model}: {len(counts)} documents, {counts.shape[1]} layers of {counts.shape[2]} experts, "
          f"{replicas} replicas a layer")  # fmt: skip
    print(
        f"{'keep':>5}{'documents':>11}{'hit':>7}"
        + "".join(f"{name:>10}" for name in POLICIES)
        + "  moved adaptive/short"
    )
    rows = {}
    for keep in KEEP:
        chosen = choose_adversarial(counts, keep)
        result = Replay(POLICIES)
        result.steps.extend(replay(adversarial_stream(counts, chosen).parts, replicas))
        lis, moves = result.lis(), result.moves()
        hit = float(chosen.hit[chosen.kept].mean())
        rows[str(keep)] = {**result.summary(), "documents": len(chosen.kept), "hit": hit}
        print(f"{keep:>5}{len(chosen.kept):>11}{hit:>7.3f}" + "".join(f"{lis[name]:>10.3f}" for name in POLICIES)
              + f"  {moves['adaptive']}/{moves['short']}", flush=True)  # fmt: skip
    facts = {"model": arguments.model, "documents": len(counts), "replicas": replicas, "seconds": spent}
    print(json.dumps({**facts, "keep": rows, **made_with()}))


if __name__ == "__main__":
    main()
