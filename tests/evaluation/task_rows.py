"""A few made-up items of each benchmark: as the published files have them, and as the harness downloads them."""

import gzip
import json

SUBJECTS = {"virology": "other", "formal_logic": "humanities"}

PIQA = [
    {"goal": "To open a jar", "sol1": "twist the lid", "sol2": "sing to the lid", "label": 0},
    {"goal": "To dry a plate", "sol1": "put it in water", "sol2": "wipe it with a towel, then wait", "label": 1},
    {"goal": "To boil an egg", "sol1": "use hot water", "sol2": "use cold milk", "label": 0},
]
HELLASWAG_RAW = [
    {
        "activity_label": "Roof shingle removal",
        "ctx_a": "A man is sitting on a roof.",
        "ctx_b": "he",
        "endings": ["sings.", "starts pulling up roofing.", "swims.", "reads."],
        "label": "1",
    },
    {
        "activity_label": "Family Life",
        "ctx_a": "[header] How to cook rice [title] Wash it. [step] Use cold water.",
        "ctx_b": "",
        "endings": ["Drain it. [substeps] Dry it.", "Paint it.", "Fold it.", "Sell it."],
        "label": "0",
    },
]
HELLASWAG = [
    {
        "index": 0,
        "context": "Roof shingle removal: A man is sitting on a roof. he",
        "endings": HELLASWAG_RAW[0]["endings"],
        "label": 1,
    },
    {
        "index": 1,
        "context": "Family Life: How to cook rice. Wash it. Use cold water.",
        "endings": ["Drain it. Dry it.", "Paint it.", "Fold it.", "Sell it."],
        "label": 0,
    },
]
WINOGRANDE = [
    {"qID": "a", "sentence": "Ann thanked Bea as _ had helped.", "option1": "Ann", "option2": "Bea", "answer": "2"},
    {"qID": "b", "sentence": "The cup fell off the shelf since the _ was small.", "option1": "cup", "option2": "shelf",
     "answer": "2"},
]  # fmt: skip
TRUTHFULQA = [
    {
        "question": "Do pigs fly?",
        "mc1_choices": ["No", "Yes"],
        "mc1_labels": [1, 0],
        "mc2_choices": ["No", "They do not", "Yes"],
        "mc2_labels": [1, 1, 0],
    }
]
TRUTHFULQA_RAW = [
    {
        "question": "Do pigs fly?",
        "mc1_targets": {"choices": ["No", "Yes"], "labels": [1, 0]},
        "mc2_targets": {"choices": ["No", "They do not", "Yes"], "labels": [1, 1, 0]},
    }
]
ARC = [
    {
        "id": "1",
        "question": "What is wet?",
        "choices": ["Sand", "Water", "Air", "Fire"],
        "answer": 1,
        "answer_key": "B",
    },
    {"id": "2", "question": "What is hot?", "choices": ["Ice", "Snow", "Fire"], "answer": 2, "answer_key": "3"},
]
ARC_RAW = [
    {
        "question": "What is wet?",
        "choices": {"text": ["Sand", "Water", "Air", "Fire"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    },
    {
        "question": "What is hot?",
        "choices": {"text": ["Ice", "Snow", "Fire"], "label": ["1", "2", "3"]},
        "answerKey": "3",
    },
]
ARC_TRAIN = [
    {"id": None, "set": kind, "question": f"Is {i} {kind}?", "choices": ["no", "yes"], "answer": 1}
    for kind in ("easy", "challenge")
    for i in range(3)
]
GSM8K = [{"question": "What is 1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"}]
GSM8K_TRAIN = [{"question": f"What is {i} + 0?", "answer": f"It is {i}.\n#### {i}"} for i in range(6)]
LAMBADA = [{"text": "She took the key and opened the door"}, {"text": "He was tired and went to bed"}]
WIKITEXT = [
    {
        "title": "Cat",
        "text": " = Cat = \n A cat is small . It purrs . \n = = Food = = \n = = = Fish = = = \n It eats fish . \n",
    },
    {"title": "Dog", "text": " = Dog = \n A dog barks , often . \n"},
]
WIKITEXT_RAW = [
    {
        "page": " = Cat = \n \n A cat is small . It purrs . \n \n = = Food = = \n \n \n = = = Fish = = = \n \n"
        " It eats fish . \n \n"
    },
    {"page": " = Dog = \n \n A dog barks , often . \n \n"},
]
MMLU = [
    {"subject": s, "index": i, "question": f" Which is {i}? ", "choices": ["0", "1", "2", "3"], "answer": i % 4}
    for s in SUBJECTS
    for i in range(3 if s == "virology" else 2)
]

FILES = {
    "piqa_val.jsonl": PIQA,
    "hellaswag_val.jsonl.gz": HELLASWAG,
    "winogrande_dev.jsonl": WINOGRANDE,
    "truthfulqa_mc.jsonl": TRUTHFULQA,
    "arc_easy_test.jsonl": ARC,
    "arc_challenge_test.jsonl": ARC[::-1],
    "arc_train.jsonl.gz": ARC_TRAIN,
    "gsm8k_test.jsonl": GSM8K,
    "gsm8k_train.jsonl.gz": GSM8K_TRAIN,
    "lambada_test.jsonl.gz": LAMBADA,
    "text_wikitext2_test.jsonl.gz": WIKITEXT,
    "mmlu_test.jsonl.gz": MMLU,
    "mmlu_dev.jsonl": MMLU,
}


def write_task_data(directory):
    directory.mkdir()
    for name, rows in FILES.items():
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (directory / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return directory
