"""Reading and writing profiles, plans and text. numpy and pydantic only; no pickle, no torch."""

from equipoise.files.atomic import atomic_directory, atomic_file, require_destination
from equipoise.files.plan_json import load_plan, plan_from_json, plan_to_json, save_plan
from equipoise.files.profile_npz import load_profile, profile_hash, save_profile

__all__ = [
    "atomic_directory",
    "atomic_file",
    "load_plan",
    "load_profile",
    "plan_from_json",
    "plan_to_json",
    "profile_hash",
    "require_destination",
    "save_plan",
    "save_profile",
]
