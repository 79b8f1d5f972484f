"""Documents, split, tokenizer and token streams of the demo model.

Problem: one small corpus of eight domains of very unequal size (novels are about 70 % of the bytes),
from which a model is trained and from which text is bundled that the model has never seen.

- Only files that are not benchmarks are read (`SOURCES`); WikiText-2 test stays out altogether.
- Split by document: the last part of each file (for contracts: of each kind) is held out, never a chunk
  of a document that was trained on. Wikipedia articles that occur in two files go to one side only.
- Sampling: domain `d` is drawn with probability `n_d^a / sum n^a` (`a` = 0.5 in `train.py`), so that
  domains other than novels get a fair share; a window is a uniform cut of that domain's token stream.
- A stream is `<s> document </s> <s> document </s> ...`, uint16.

Cost: about a minute and 1 GB of memory, once; the result is cached in the working directory.
"""

import collections
import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

PAD, BOS, EOS = "<pad>", "<s>", "</s>"  # ids 0, 1, 2: bos and eos as MixtralConfig has them by default
VOCAB = 4096


@dataclass(frozen=True)
class Source:
    """One data file: its domain and the fraction of its documents, counted from the end, held out."""

    file: str
    domain: str
    held_out: float


SOURCES = (
    Source("text_novels.jsonl.gz", "fiction", 0.06),
    Source("text_wikipedia_articles.jsonl.gz", "wikipedia", 0.08),
    Source("text_wikipedia_cal.jsonl.gz", "wikipedia", 0.08),
    Source("text_wikitext2_train_prefix.jsonl", "wikipedia", 0.08),
    Source("text_contracts.jsonl.gz", "contracts", 0.10),
    Source("gsm8k_train.jsonl.gz", "gsm8k", 0.05),
    Source("text_tinystories_1000.jsonl", "tinystories", 0.10),
    Source("text_c4_cal.jsonl", "c4", 0.20),
    Source("text_code_cal.jsonl", "code", 0.20),
    Source("text_technical_cal.jsonl", "technical", 0.20),
)
DOMAINS = tuple(dict.fromkeys(source.domain for source in SOURCES))


@dataclass(frozen=True)
class Document:
    """One document after cleaning; `name` says where it came from (file:row)."""

    text: str
    domain: str
    name: str
    title: str


def read_rows(path: Path) -> list[dict]:
    """Reads a .jsonl or .jsonl.gz file."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def clean(text: str) -> str:
    """Collapses runs of blank lines: contracts are up to half newlines, which any model predicts for free."""
    return re.sub(r"\n(?:[ \t]*\n){2,}", "\n\n", text.replace("\r\n", "\n")).strip()


def load_documents(data: Path) -> tuple[list[Document], list[Document]]:
    """Reads every source and splits it by document.

    Returns:
        (training documents, held-out documents), in file order.
    """
    train, held = [], []
    for source in SOURCES:
        groups: dict[str, list[Document]] = collections.defaultdict(list)
        for row_number, row in enumerate(read_rows(data / source.file)):
            text = row["text"] if "text" in row else f"Question: {row['question']}\nAnswer: {row['answer']}"
            title = re.sub(r"[\W_]+", " ", row.get("title") or "").strip().lower()
            document = Document(clean(text), source.domain, f"{source.file}:{row_number}", title)
            groups[row.get("kind", "")].append(document)
        for documents in groups.values():
            cut = len(documents) - max(1, round(source.held_out * len(documents)))
            train += documents[:cut]
            held += documents[cut:]
    # Two dumps of Wikipedia can hold the same article; one that is also in WikiText-2 test is kept out too.
    tested = {
        re.sub(r"[\W_]+", " ", row["title"]).strip().lower() for row in read_rows(data / "text_wikitext2_test.jsonl.gz")
    }
    tested |= {document.title for document in held if document.title and document.domain == "wikipedia"}
    train = [d for d in train if not (d.domain == "wikipedia" and d.title in tested)]
    return train, held


def overlap(train: list[Document], held: list[Document], min_chars: int = 60) -> dict[str, float]:
    """Share of held-out characters, per domain, in lines of >= min_chars that training text has word for word."""
    seen = {hash(line.strip()) for d in train for line in d.text.split("\n") if len(line) >= min_chars}
    total, shared = collections.Counter(), collections.Counter()
    for document in held:
        for line in document.text.split("\n"):
            total[document.domain] += len(line)
            if len(line) >= min_chars and hash(line.strip()) in seen:
                shared[document.domain] += len(line)
    return {domain: shared[domain] / total[domain] for domain in DOMAINS}


def train_tokenizer(documents: list[Document], chars_per_domain: int = 3_000_000) -> Tokenizer:
    """Trains a byte-level BPE of `VOCAB` entries, digits one by one, on at most so many characters a domain.

    The cap keeps nineteenth-century prose from taking the whole vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[PAD, BOS, EOS],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    by_domain = collections.defaultdict(list)
    for document in documents:
        by_domain[document.domain].append(document.text)
    sample = []
    for texts in by_domain.values():
        share = min(1.0, chars_per_domain / sum(map(len, texts)))
        sample += [text[: int(len(text) * share) + 1] for text in texts]  # the head of each: every author counts
    tokenizer.train_from_iterator(sample, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]),
        ]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path, max_length: int) -> None:
    """Writes the tokenizer so that `AutoTokenizer.from_pretrained(out)` loads it."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)


def encode(tokenizer: Tokenizer, documents: list[Document]) -> dict[str, np.ndarray]:
    """Encodes documents to one stream a domain: {domain: [n] uint16}, each document as <s> ... </s>."""
    eos = tokenizer.token_to_id(EOS)
    streams: dict[str, list[np.ndarray]] = {domain: [] for domain in DOMAINS}
    for document in documents:
        ids = tokenizer.encode(document.text).ids  # begins with <s>
        streams[document.domain].append(np.array([*ids, eos], dtype=np.uint16))
    return {domain: np.concatenate(parts) for domain, parts in streams.items()}


def prepare(data: Path, work: Path) -> tuple[Tokenizer, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Tokenizer, training streams and held-out streams, from the cache in `work` when it is there."""
    work.mkdir(parents=True, exist_ok=True)
    cache, vocabulary = work / "streams.npz", work / "bpe.json"
    if cache.exists() and vocabulary.exists():
        arrays = dict(np.load(cache))
        train, held = ({d: arrays[f"{side}_{d}"] for d in DOMAINS} for side in ("train", "held"))
        return Tokenizer.from_file(str(vocabulary)), train, held
    train_docs, held_docs = load_documents(data)
    tokenizer = train_tokenizer(train_docs)
    train, held = encode(tokenizer, train_docs), encode(tokenizer, held_docs)
    tokenizer.save(str(vocabulary))
    partial = work / "partial.npz"
    np.savez(partial, **{f"train_{d}": s for d, s in train.items()}, **{f"held_{d}": s for d, s in held.items()})
    partial.rename(cache)
    return tokenizer, train, held


def sampling_probabilities(streams: dict[str, np.ndarray], exponent: float) -> np.ndarray:
    """Probability of each domain: [D], proportional to tokens ** exponent."""
    sizes = np.array([len(streams[domain]) for domain in DOMAINS], dtype=np.float64) ** exponent
    return sizes / sizes.sum()


def sample_batch(
    streams: dict[str, np.ndarray], probabilities: np.ndarray, rows: int, length: int, rng: np.random.Generator
) -> np.ndarray:
    """Draws `rows` windows, domain first: [rows, length + 1] int64."""
    batch = np.empty((rows, length + 1), dtype=np.int64)
    for row, domain in enumerate(rng.choice(len(DOMAINS), size=rows, p=probabilities)):
        stream = streams[DOMAINS[domain]]
        start = rng.integers(0, len(stream) - length)
        batch[row] = stream[start : start + length + 1]
    return batch


def window_starts(size: int, length: int, limit: int | None = None) -> np.ndarray:
    """Starts of windows that overlap by one token, so that each token but the first is scored once: [n].

    The incomplete last window is dropped; `limit` picks windows spread over the whole stream.
    """
    starts = np.arange((size - 1) // length) * length
    if limit is not None and limit < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, limit).astype(int)]
    return starts


def windows(stream: np.ndarray, length: int, limit: int | None = None) -> np.ndarray:
    """The windows themselves: [n, length + 1] int64."""
    starts = window_starts(len(stream), length, limit)
    return stream[starts[:, None] + np.arange(length + 1)].astype(np.int64)
