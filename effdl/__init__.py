"""effdl: make an ONNX model smaller and faster, prove that it still computes the right thing.

The verbs of the command line, for scripts. Nothing heavy is imported before one is used.

>>> import effdl
>>> report = effdl.optimize("m.onnx", recipe="lossless", output="o.onnx")  # doctest: +SKIP
>>> report.bench.models[1].ratio  # doctest: +SKIP
1.42
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from effdl.errors import (
    CheckFailed,
    DataError,
    EffdlError,
    ModelError,
    OutputError,
    RecipeError,
    TargetError,
    UsageError,
)

if TYPE_CHECKING:
    from effdl.api import (
        bench,
        compare,
        compare_there,
        evaluate,
        explain,
        inspect,
        load,
        optimize,
        profile,
        save,
    )
    from effdl.recipe import Recipe
    from effdl.run_options import PassBug, RunOptions

# ONNX Runtime 1.32 sends usage data over the network unless it is told not to before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

__all__ = [
    "CheckFailed",
    "DataError",
    "EffdlError",
    "ModelError",
    "OutputError",
    "PassBug",
    "Recipe",
    "RecipeError",
    "RunOptions",
    "TargetError",
    "UsageError",
    "bench",
    "compare",
    "compare_there",
    "evaluate",
    "explain",
    "inspect",
    "load",
    "optimize",
    "profile",
    "save",
]

_HOME = {
    "Recipe": "effdl.recipe",
    "RunOptions": "effdl.run_options",
    "PassBug": "effdl.run_options",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'effdl' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOME.get(name, "effdl.api")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
