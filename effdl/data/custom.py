"""A metric of the user's own: ``module:function``, found in the current folder too."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from effdl.data.metrics import Array, Metric
from effdl.errors import UsageError, nearest


def custom_metric(spec: str) -> Metric:
    """Return the metric that a Python function computes.

    It is called with the outputs of all samples and their labels (None where there are none), and
    returns a number, or an array with a score per sample. A higher score is better unless the function
    has an attribute ``lower_is_better`` that is true.

    Args:
        spec: ``module:function``; the module is looked for in the current folder first.

    Raises:
        UsageError: no such module or function, or it cannot be imported; and, when it is used, the
            function fails or returns something else.
    """
    function = _find(spec)

    def whole(outputs: Array, labels: Any) -> float | Array:
        try:
            value = function(outputs, labels)
        except Exception as e:  # whatever the user's code raises is told as the user's fault
            raise UsageError(
                f"metric {spec} failed: {type(e).__name__}: {e}",
                hint=f"it was called with outputs {list(outputs.shape)} and "
                + ("no labels" if labels is None else f"labels {list(np.shape(labels))}"),
            ) from e
        return _number(value, len(outputs), spec)

    better = not getattr(function, "lower_is_better", False)
    return Metric(spec, whole=whole, higher_is_better=better, needs_labels=False)


def _find(spec: str) -> Callable[[Array, Any], Any]:
    module_name, _, name = spec.partition(":")
    if not module_name or not all(p.isidentifier() for p in [*module_name.split("."), name]):
        raise UsageError(
            f"'{spec}' is no module:function", hint="such as mymetrics:iou, for mymetrics.py here"
        )
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name is not None and (module_name == e.name or module_name.startswith(f"{e.name}.")):
            raise UsageError(
                f"there is no Python module '{module_name}'",
                hint=f"it is looked for as {module_name.replace('.', '/')}.py in the current folder, "
                "then among the installed packages",
            ) from None
        raise UsageError(f"module '{module_name}' cannot be imported: {e}") from e
    except Exception as e:  # whatever the user's module raises while it is imported
        raise UsageError(
            f"module '{module_name}' cannot be imported: {type(e).__name__}: {e}"
        ) from e
    finally:
        sys.path.remove(here)
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UsageError(
            f"module '{module_name}' has no function '{name}'", hint=nearest(name, names)
        )
    return function  # type: ignore[no-any-return]


def _number(value: Any, count: int, spec: str) -> float | Array:
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        array = None
    if array is not None and array.ndim == 0:
        return float(array)
    if array is not None and array.shape == (count,):
        return array
    got = type(value).__name__ if array is None else f"an array {list(array.shape)}"
    raise UsageError(
        f"metric {spec} returned {got}",
        hint=f"a number, or an array with one score for each of the {count} samples",
    )
