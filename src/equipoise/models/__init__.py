"""The only place that knows model families: which modules hold routed experts, how they are laid out and called."""

from equipoise.models.families import MoELayer, find_layers
from equipoise.models.layout import ExpertsLayout, Weight
from equipoise.models.loading import LoadedModel, ModelSource, empty_model, load_model

__all__ = [
    "ExpertsLayout",
    "LoadedModel",
    "MoELayer",
    "ModelSource",
    "Weight",
    "empty_model",
    "find_layers",
    "load_model",
]
