"""Writes the text bundled with the package: `calibration.jsonl.gz` and `heldout.jsonl.gz`.

    python training/demo/bundle.py --data ../shared/data --out src/equipoise/demo/text

Both are cut from held-out documents only (see `data.py`), no document is in both files, and each domain gets the
same number of characters in both. A long document gives several excerpts to one file: there are but four
held-out novels. Excerpts end at a line's end where there is one near. The order is shuffled with a fixed seed, so
any prefix is a mix. The gzip header carries no time, so the same input gives the same bytes.
"""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
from data import DOMAINS, Document, load_documents

EXCERPT = 4000  # characters
CHARS = {
    "fiction": 52_000,
    "wikipedia": 52_000,
    "contracts": 44_000,
    "gsm8k": 30_000,
    "tinystories": 30_000,
    "c4": 26_000,
    "code": 23_000,
    "technical": 16_000,
}  # a file
SEED = 7


def excerpts(document: Document, limit: int) -> list[str]:
    """Cuts a document into at most `limit` excerpts of at most `EXCERPT` characters, spread over the document."""
    pieces, rest = [], document.text
    while rest:
        cut = len(rest) if len(rest) <= EXCERPT else max(rest.rfind("\n", EXCERPT // 2, EXCERPT), 0) or EXCERPT
        pieces.append(rest[:cut].strip())
        rest = rest[cut:].lstrip("\n")
    pieces = [piece for piece in pieces if len(piece) > 40]
    if len(pieces) <= limit:
        return pieces
    return [pieces[i] for i in np.linspace(0, len(pieces) - 1, limit).astype(int)]


def choose(documents: list[Document], chars: int, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Deals one domain's documents alternately to the two files until each has `chars` characters."""
    order = rng.permutation(len(documents))
    files: tuple[list[str], list[str]] = ([], [])
    for side in (0, 1):
        mine = [documents[i] for i in order[side::2]]
        for limit in range(1, 50):  # as few excerpts a document as fill the quota, so as many documents as can be
            files[side][:] = [text for document in mine for text in excerpts(document, limit)]
            if sum(map(len, files[side])) >= chars:
                break
        size = np.cumsum([len(text) for text in files[side]])
        del files[side][int(np.searchsorted(size, chars)) + 1 :]
    return files


def write(path: Path, records: list[dict]) -> None:
    """Writes gzipped JSON Lines under a temporary name, then renames it."""
    payload = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    partial = path.with_suffix(".partial")
    partial.write_bytes(gzip.compress(payload, mtime=0))
    partial.rename(path)


def main() -> None:
    """Writes both files and prints their mix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    _, held = load_documents(args.data)
    rng = np.random.default_rng(SEED)
    sides: tuple[list[dict], list[dict]] = ([], [])
    for domain in DOMAINS:
        chosen = choose([d for d in held if d.domain == domain], CHARS[domain], rng)
        for records, texts in zip(sides, chosen, strict=True):
            records += [{"text": text, "domain": domain} for text in texts]
    summary = {}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, records in zip(("calibration", "heldout"), sides, strict=True):
        write(args.out / f"{name}.jsonl.gz", [records[i] for i in rng.permutation(len(records))])
        summary[name] = {
            d: [sum(r["domain"] == d for r in records), sum(len(r["text"]) for r in records if r["domain"] == d)]
            for d in DOMAINS
        }
        print(name, len(records), "records", sum(len(r["text"]) for r in records), "characters", summary[name])
    assert not {r["text"] for r in sides[0]} & {r["text"] for r in sides[1]}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
