"""`save_pretrained` of a balanced model: in a fresh process equal after `import equipoise`, an error without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core_models import batch, fresh_process, random_slots
from equipoise.errors import InputError
from equipoise.models import find_layers, load_model
from equipoise.runtime import apply, plan_of
from families.families_support import identity_slots, make_plan
from tiny import FAMILIES

LOAD = """
import sys, torch
if sys.argv[1] == "with":
    import equipoise
from safetensors.torch import load_file, save_file
import transformers
torch.set_num_threads(1)
for i in range(2, len(sys.argv), 2):
    directory, tensors = sys.argv[i], sys.argv[i + 1]
    cls = transformers.AutoModelForCausalLM
    if transformers.AutoConfig.from_pretrained(directory).is_encoder_decoder:
        cls = transformers.AutoModelForSeq2SeqLM
    try:
        model = cls.from_pretrained(directory).eval()
    except Exception as error:
        print("REFUSED", type(error).__name__, str(error).splitlines()[0])
        continue
    if sys.argv[1] != "with":
        print("LOADED")
        continue
    inputs = load_file(tensors)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert not any("transformers_modules" in name for name in sys.modules)
    save_file({"logits": logits}, tensors + ".out")
    model.save_pretrained(directory + "-again")
    print("SAVED")
"""

CASES = {
    "mixtral": (FAMILIES["mixtral"], random_slots),
    "gpt_oss": (FAMILIES["gpt_oss"], random_slots),
    "switch": (FAMILIES["switch_transformers"], random_slots),
    "switch_bf16": (lambda: FAMILIES["switch_transformers"](dtype=torch.bfloat16), random_slots),
    "partial": (FAMILIES["qwen3_moe"], lambda row: random_slots(row) if row == 1 else identity_slots(row)),
    "identity": (FAMILIES["olmoe"], identity_slots),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, torch.Tensor]]:
    """Name -> (checkpoint, inputs, logits in memory)."""
    root = tmp_path_factory.mktemp("saved")
    out = {}
    for name, (build, slots) in CASES.items():
        model = build()
        apply(model, make_plan(model, slots))
        inputs = batch()
        if model.config.is_encoder_decoder:
            inputs |= {"decoder_input_ids": inputs["input_ids"].flip(0).contiguous()}
        with torch.no_grad():
            logits = model(**inputs).logits
        model.save_pretrained(root / name, max_shard_size="20KB")
        save_file(inputs, root / f"{name}.safetensors")
        out[name] = (root / name, root / f"{name}.safetensors", logits)
    return out


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The same number of threads as the fresh process: a sum may be split otherwise and round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_fresh_process_with_import_is_bit_equal(saved: dict[str, tuple[Path, Path, torch.Tensor]]):
    arguments = [path for directory, inputs, _ in saved.values() for path in (directory, inputs)]
    done = fresh_process(LOAD, "with", *arguments)
    assert done.stdout.split() == ["SAVED"] * len(saved), done.stderr[-3000:]
    for directory, inputs, logits in saved.values():
        assert torch.equal(load_file(f"{inputs}.out")["logits"], logits), directory
        # What the fresh process saved again is the same checkpoint.
        first, second = {}, {}
        for tensors, path in ((first, directory), (second, Path(f"{directory}-again"))):
            for file in path.glob("*.safetensors"):
                tensors |= load_file(file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert plan_of(load_model(f"{directory}-again", tokenizer=False).model) == plan_of(
            load_model(directory, tokenizer=False).model
        )


def test_fresh_process_without_import_is_refused(saved: dict[str, tuple[Path, Path, torch.Tensor]]):
    """Every one of them, also the plan that changes nothing: the checkpoint says that it needs equipoise."""
    arguments = [path for directory, inputs, _ in saved.values() for path in (directory, inputs)]
    done = fresh_process(LOAD, "without", *arguments)
    lines = done.stdout.splitlines()
    assert len(lines) == len(saved), done.stderr[-3000:]
    for name, line in zip(saved, lines, strict=True):
        assert line.startswith("REFUSED"), f"{name}: {line}"
        assert "equipoise" in line, f"{name}: {line}"


def test_config_holds_the_whole_plan(saved: dict[str, tuple[Path, Path, torch.Tensor]]):
    for directory, _, _ in saved.values():
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        assert config["quantization_config"]["quant_method"] == "equipoise"
        assert config["quantization_config"]["plan"]["format"] == "equipoise-plan"
        assert config["experts_implementation"] == "equipoise"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda q: q.pop("plan"), "no plan"),
        (lambda q: q["plan"].update(version=9), "version 9"),
        (lambda q: q["plan"]["layers"][0]["slots"].pop(), "shares"),
        (lambda q: q["plan"]["model"].update(model_type="olmoe"), "model_type 'olmoe'"),
        (lambda q: q["plan"]["model"].update(dtype="bfloat16"), "dtype 'bfloat16'"),
    ],
)
def test_a_damaged_plan_inside_a_checkpoint_is_refused(saved: dict, tmp_path: Path, edit, message: str):
    directory = saved["mixtral"][0]
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    edit(config["quantization_config"])
    for file in directory.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_model(tmp_path, tokenizer=False)


def test_a_balanced_model_is_for_inference(saved: dict):
    model = load_model(saved["mixtral"][0], tokenizer=False).model
    assert model.hf_quantizer.is_trainable is False


def test_layers_without_slots_run_what_they_ran_before(saved: dict):
    """Grouped or eager: in the model in memory, and again after loading, transformers' own choice."""
    untouched = FAMILIES["qwen3_moe"]()
    memory = FAMILIES["qwen3_moe"]()
    apply(memory, make_plan(memory, CASES["partial"][1]))
    loaded = load_model(saved["partial"][0], tokenizer=False).model
    wanted = untouched.config._experts_implementation
    assert wanted != "equipoise"
    for model in (memory, loaded):
        assert model.config._experts_implementation == "equipoise"
        assert {layer.experts.equipoise_base for layer in find_layers(model)} == {wanted}
