"""What a model is worth: perplexity on text, lm-evaluation-harness tasks, paired differences of models."""
