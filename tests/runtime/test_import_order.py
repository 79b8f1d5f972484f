"""transformers learns the format whichever of the two is imported first, and from whatever place."""

import subprocess
import sys

import pytest

MODULES = (
    "from transformers import AutoModelForCausalLM",
    "from transformers.models.auto.modeling_auto import AutoModelForSeq2SeqLM",
    "import transformers.modeling_utils",
)
CHECK = "import transformers.modeling_utils; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known"


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("line", MODULES)
def test_registered(line, first):
    order = ("import equipoise", line) if first else (line, "import equipoise")
    code = "; ".join((*order, CHECK, "print('equipoise' in known)"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True"], done.stderr[-500:]


def test_the_package_alone_loads_neither_torch_nor_transformers():
    code = "import sys, equipoise, equipoise.planning, equipoise.exchange; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
