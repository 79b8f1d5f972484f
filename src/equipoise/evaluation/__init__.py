"""What a model is worth: perplexity on text, lm-evaluation-harness tasks, paired differences of models."""

from equipoise.evaluation.data import Batch, Window, batches, windows
from equipoise.evaluation.perplexity import TextResult, evaluate_text, paired_difference

__all__ = ["Batch", "TextResult", "Window", "batches", "evaluate_text", "paired_difference", "windows"]
