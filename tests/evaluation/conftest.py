"""The tiny models as fixtures."""

import pytest
from task_rows import write_task_data
from tiny_eval_models import byte_tokenizer, tiny_mixtral, tiny_switch
from transformers import MixtralForCausalLM, PreTrainedTokenizerFast
from transformers import SwitchTransformersForConditionalGeneration as Switch


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def mixtral() -> MixtralForCausalLM:
    return tiny_mixtral()


@pytest.fixture(scope="session")
def switch() -> Switch:
    return tiny_switch()


@pytest.fixture(scope="session")
def mixtral_dir(tmp_path_factory, mixtral, tokenizer):
    """A model directory as a user has it."""
    path = tmp_path_factory.mktemp("model") / "mixtral"
    mixtral.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def task_data(tmp_path_factory):
    """A directory with a few items of every benchmark."""
    return write_task_data(tmp_path_factory.mktemp("tasks") / "data")
