"""The folder is the registry: ``passes/prune/weights.py`` is the pass ``prune_weights``.

A file at the top of the folder is named as its pass. Files that start with an underscore, and
``base.py``, are not passes. The class in ``prune/weights.py`` is ``PruneWeights``.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, cast

from effdl.errors import RecipeError, nearest

if TYPE_CHECKING:
    from effdl.passes.base import Pass

_ROOT = Path(__file__).parent


def names() -> list[str]:
    """Names of all passes, sorted, without importing one."""
    return sorted(_modules())


def get(name: str) -> type[Pass]:
    """Return the class of the pass ``name``.

    Raises:
        RecipeError: no such pass; the hint has the nearest name.
    """
    modules = _modules()
    if name not in modules:
        raise RecipeError(f"unknown pass '{name}'", hint=nearest(name, modules))
    module = importlib.import_module(modules[name])
    return cast("type[Pass]", getattr(module, class_name(name)))


def name_of(cls: type[Pass]) -> str:
    """Return the name of the pass that ``cls`` is: its place in this folder."""
    return "_".join(cls.__module__.removeprefix(__name__ + ".").split("."))


def class_name(name: str) -> str:
    """``prune_weights`` is the class ``PruneWeights``."""
    return "".join(part.capitalize() for part in name.split("_"))


def _modules() -> dict[str, str]:
    found = {}
    for file in _ROOT.rglob("*.py"):
        parts = file.relative_to(_ROOT).with_suffix("").parts
        if parts != ("base",) and not any(p.startswith("_") for p in parts):
            found["_".join(parts)] = ".".join((__name__, *parts))
    return found
