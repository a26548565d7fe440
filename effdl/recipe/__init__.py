"""YAML <-> Recipe: every fault carries file:line:column, every unknown name the nearest one.

Nothing is imported before it is used, so that listing presets loads no pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effdl.recipe.describe import OptionInfo, PassInfo, describe_pass, describe_passes
    from effdl.recipe.fit import CheckReport, check
    from effdl.recipe.json_schema import schema
    from effdl.recipe.model import Budget, Data, Evaluation, Recipe, Step
    from effdl.recipe.overrides import apply_overrides
    from effdl.recipe.reader import load
    from effdl.recipe.shipped import PresetInfo, preset_names, preset_text, presets
    from effdl.recipe.starter import write_starter
    from effdl.recipe.writer import dump, to_dict

_HOME = {
    "Budget": "model",
    "CheckReport": "fit",
    "Data": "model",
    "Evaluation": "model",
    "OptionInfo": "describe",
    "PassInfo": "describe",
    "PresetInfo": "shipped",
    "Recipe": "model",
    "Step": "model",
    "apply_overrides": "overrides",
    "check": "fit",
    "describe_pass": "describe",
    "describe_passes": "describe",
    "dump": "writer",
    "load": "reader",
    "preset_names": "shipped",
    "preset_text": "shipped",
    "presets": "shipped",
    "schema": "json_schema",
    "to_dict": "writer",
    "write_starter": "starter",
}

__all__ = [
    "Budget",
    "CheckReport",
    "Data",
    "Evaluation",
    "OptionInfo",
    "PassInfo",
    "PresetInfo",
    "Recipe",
    "Step",
    "apply_overrides",
    "check",
    "describe_pass",
    "describe_passes",
    "dump",
    "load",
    "preset_names",
    "preset_text",
    "presets",
    "schema",
    "to_dict",
    "write_starter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'effdl.recipe' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"effdl.recipe.{_HOME[name]}"), name)
