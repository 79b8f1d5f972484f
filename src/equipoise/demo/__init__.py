"""The bundled demo model and text, so that Equipoise can be tried without a download.

`model/` is a Mixtral of 7.4 million parameters (4 layers of 16 experts, top-2, bf16), trained by
`training/demo/train.py`; `AutoModelForCausalLM.from_pretrained(model_dir())` loads it without Equipoise.
`text/` holds two disjoint samples of documents that the model was not trained on; records are
`{"text": ..., "domain": ...}` in a shuffled order, so that any prefix is a mix of the domains. Sources and licences
are in `text/LICENSES.md`.

What it is not: a useful language model. It shows routing that training left uneven, at a size that runs anywhere.
"""

from importlib import resources
from pathlib import Path

__all__ = ["calibration_text", "heldout_text", "model_dir"]

# The package is installed as plain files (never imported from a zip), so a resource is a path.
_ROOT = Path(str(resources.files(__name__)))


def model_dir() -> Path:
    """Directory of the demo model and its tokenizer, in Hugging Face layout."""
    return _ROOT / "model"


def calibration_text() -> Path:
    """Text to measure loads and importance on (.jsonl.gz), disjoint from `heldout_text`."""
    return _ROOT / "text" / "calibration.jsonl.gz"


def heldout_text() -> Path:
    """Text to score plans on (.jsonl.gz), disjoint from `calibration_text`."""
    return _ROOT / "text" / "heldout.jsonl.gz"
