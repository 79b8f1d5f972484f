"""The native families are known to transformers whatever a program imports first, and cost nothing until then."""

import pytest

from core_models import fresh_process

LINES = (
    "from transformers import AutoConfig",
    "from transformers import AutoTokenizer",
    "from transformers import AutoModelForCausalLM",
    "from transformers import LlamaConfig",
    "from transformers import DeepseekV2Config",
    "from transformers import LlamaForCausalLM",
    "import transformers.modeling_utils",
    "import transformers.models.auto.modeling_auto",
)
CHECK = (
    "from transformers import AutoConfig",
    "found = [AutoConfig.for_model(name) for name in ('deepseek', 'llama_moe')]",
    "from transformers import AutoModelForCausalLM as auto",
    "print(*(auto._model_mapping[type(config)].__name__ for config in found))",
)


@pytest.mark.parametrize("order", [*(("import equipoise", line) for line in LINES), (LINES[2], "import equipoise")])
def test_known_in_any_order(order: tuple[str, str]):
    done = fresh_process("; ".join((*order, *CHECK)))
    assert done.stdout.split() == ["DeepseekForCausalLM", "LlamaMoEForCausalLM"], done.stderr[-800:]


def test_the_one_call_without_the_package():
    done = fresh_process("; ".join(("from equipoise.native import register; register()", *CHECK)))
    assert done.stdout.split() == ["DeepseekForCausalLM", "LlamaMoEForCausalLM"], done.stderr[-800:]


def test_configurations_need_no_torch():
    code = "import sys, equipoise; from transformers import AutoConfig; print('torch.nn' in sys.modules)"
    plain = code.replace(", equipoise", "")
    assert fresh_process(code).stdout == fresh_process(plain).stdout
