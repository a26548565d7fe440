"""Metrics of predictions against labels, numpy only.

Each takes the outputs of all samples and their labels, the samples along the first axis, and returns
one number. ``METRICS`` has them by name; those in ``LOWER_IS_BETTER`` are errors, the others scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from effdl.errors import DataError

Array = npt.NDArray[Any]
Metric = Callable[[Array, Array], float]


def top1(outputs: Array, labels: Array) -> float:
    """Share of samples whose largest output is at the label.

    Args:
        outputs: scores, [samples, classes] or [samples, classes, ...] for labels per position.
        labels: class numbers, [samples] or [samples, ...].

    Raises:
        DataError: shapes that do not belong together.
    """
    return _top(outputs, labels, 1)


def top5(outputs: Array, labels: Array) -> float:
    """Share of samples whose label is among the five largest outputs; arguments as ``top1``."""
    return _top(outputs, labels, 5)


def mse(outputs: Array, labels: Array) -> float:
    """Mean squared difference; both arrays have the same shape, axes of length 1 aside."""
    a, b = _alike(outputs, labels, "mse")
    return float(np.mean((a - b) ** 2))


def spearman(outputs: Array, labels: Array) -> float:
    """Spearman's rank correlation of one number per sample, ties with their average rank.

    It is Pearson's correlation of the ranks. NaN when either side is constant.
    """
    a, b = _alike(outputs, labels, "spearman")
    if a.ndim != 1 or len(a) < 2:
        raise DataError(f"spearman wants one number per sample, not {list(np.shape(outputs))}")
    x, y = (r - r.mean() for r in (_ranks(a), _ranks(b)))
    norm = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum() / norm) if norm else float("nan")


def agreement(outputs: Array, labels: Array) -> float:
    """Share of samples with the same largest output as the reference.

    Args:
        outputs: scores, [samples, ..., classes].
        labels: the reference's scores, same shape.
    """
    if np.shape(outputs) != np.shape(labels):
        raise _shapes("agreement", outputs, labels)
    if np.ndim(outputs) < 2:
        raise DataError(f"agreement wants [samples, classes], not {list(np.shape(outputs))}")
    same = np.argmax(outputs, -1) == np.argmax(labels, -1)
    return float(np.mean(same & ~np.isnan(outputs).any(-1)))


METRICS: dict[str, Metric] = {
    "top1": top1,
    "top5": top5,
    "mse": mse,
    "spearman": spearman,
    "agreement": agreement,
}
LOWER_IS_BETTER = frozenset({"mse"})


def _top(outputs: Array, labels: Array, k: int) -> float:
    scores, truth = np.asarray(outputs), np.asarray(labels)
    if truth.dtype.kind not in "iub":
        raise DataError(f"labels must be class numbers, not {truth.dtype}")
    scores, truth = _without_ones(scores), _without_ones(truth)
    if scores.ndim < 2 or truth.shape != _positions(scores) or not truth.size:
        raise _shapes(f"top{k}", outputs, labels)
    classes = scores.shape[1]
    if truth.min() < 0 or truth.max() >= classes:
        raise DataError(
            f"labels go from {truth.min()} to {truth.max()}, the model has {classes} classes"
        )
    scores = np.moveaxis(scores, 1, -1).reshape(-1, classes)
    flat = truth.reshape(-1, 1).astype(np.int64)
    best = np.argsort(-scores.astype(np.float64), axis=1, kind="stable")[:, :k]
    hit = (best == flat).any(axis=1) & ~np.isnan(scores).any(axis=1)
    return float(hit.mean())


def _without_ones(array: Array) -> Array:
    """Drop axes of length 1, but not the samples."""
    return array.reshape([d for k, d in enumerate(array.shape) if k == 0 or d != 1])


def _positions(scores: Array) -> tuple[int, ...]:
    """The shape of the labels of ``scores``: all axes but that of the classes."""
    return tuple(d for k, d in enumerate(scores.shape) if k != 1)


def _alike(outputs: Array, labels: Array, name: str) -> tuple[Array, Array]:
    a, b = (np.squeeze(np.asarray(x, np.float64)) for x in (outputs, labels))
    if a.shape != b.shape or not a.size:
        raise _shapes(name, outputs, labels)
    return a, b


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse])


def _shapes(name: str, outputs: Array, labels: Array) -> DataError:
    return DataError(
        f"{name}: outputs {list(np.shape(outputs))} and labels {list(np.shape(labels))} "
        "do not belong together"
    )
