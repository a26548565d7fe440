"""Metrics of predictions against labels, numpy only.

Each function takes the outputs of all samples and their labels, the samples along the first axis, and
returns one number; ``METRICS`` has them by name. ``metric_of`` gives a metric in the parts that scoring
a model run by run, and comparing two models sample by sample, are made of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from effdl.errors import DataError, UsageError, nearest

Array = npt.NDArray[Any]
Function = Callable[[Array, Array], float]
BEST_PSNR = 100.0
"""Decibels of a sample without any error: a mean over samples must stay finite."""


@dataclass(frozen=True)
class Metric:
    """A metric in parts.

    Args:
        name: as it was asked for.
        samples: a score per sample of a few outputs and their labels; the metric is their mean. None
            where it is no mean of samples.
        keep: what ``whole`` needs of the outputs of one run, its first axis the samples.
        final: applied once to what was kept of all runs.
        whole: the metric of what was kept of all samples, or a score per sample.
        higher_is_better: False for an error.
        share: it is between 0 and 1, a share of samples.
        needs_labels: False where it can be computed without.
        check: raises where labels cannot belong to outputs of this kind; given the outputs of one run
            and all labels.
    """

    name: str
    samples: Callable[[Array, Array], Array] | None = None
    keep: Callable[[Array], Array] = lambda outputs: outputs
    final: Callable[[Array], Array] = lambda kept: kept
    whole: Callable[[Array, Any], float | Array] | None = None
    higher_is_better: bool = True
    share: bool = False
    needs_labels: bool = True
    check: Callable[[Array, Array], None] = lambda outputs, labels: None


def top1(outputs: Array, labels: Array) -> float:
    """Share of samples whose largest output is at the label.

    Args:
        outputs: scores, [samples, classes] or [samples, classes, ...] for labels per position.
        labels: class numbers, [samples] or [samples, ...].

    Raises:
        DataError: shapes that do not belong together.
    """
    return float(_top(outputs, labels, 1).mean())


def top5(outputs: Array, labels: Array) -> float:
    """Share of samples whose label is among the five largest outputs; arguments as ``top1``."""
    return float(_top(outputs, labels, 5).mean())


def f1(outputs: Array, labels: Array) -> float:
    """Macro F1: the mean over classes of the harmonic mean of precision and recall.

    A class that is neither among the labels nor among the predictions does not count. With one number
    per sample in place of scores there are two classes, and the second is predicted above 0.5 where
    all numbers are probabilities, above 0 otherwise.

    Args:
        outputs: scores, [samples, classes, ...], or [samples] or [samples, 1].
        labels: class numbers, [samples] or [samples, ...].
    """
    _check_f1(np.asarray(outputs), np.asarray(labels))
    return _macro_f1(_threshold(_predicted(outputs)), labels)


def mse(outputs: Array, labels: Array) -> float:
    """Mean squared difference; both arrays have the same shape, axes of length 1 aside."""
    return float(_squares(outputs, labels, "mse").mean())


def psnr(outputs: Array, labels: Array) -> float:
    """Peak signal-to-noise ratio in dB, the mean over samples; a sample without error counts 100 dB.

    The peak is 255 for labels of whole numbers or above 1, 2 where they go below 0 but not below -1
    (-1 to 1), and 1 otherwise.
    """
    return float(_psnr(outputs, labels, _peak(labels)).mean())


def spearman(outputs: Array, labels: Array) -> float:
    """Spearman's rank correlation of one number per sample, ties with their average rank.

    It is Pearson's correlation of the ranks. NaN when either side is constant.
    """
    a, b = (np.squeeze(np.asarray(x, np.float64)) for x in (outputs, labels))
    if a.shape != b.shape or not a.size:
        raise _shapes("spearman", outputs, labels)
    if a.ndim != 1 or len(a) < 2:
        raise DataError(f"spearman wants one number per sample, not {list(np.shape(outputs))}")
    x, y = (r - r.mean() for r in (_ranks(a), _ranks(b)))
    norm = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum() / norm) if norm else float("nan")


def agreement(outputs: Array, labels: Array) -> float:
    """Share of samples with the same largest output as the reference.

    Args:
        outputs: scores, [samples, ..., classes]; of four axes or more [samples, classes, ...] where
            the second axis is not longer than the last.
        labels: the reference's scores, same shape, or what ``classes`` makes of them.
    """
    return float(_agreement(outputs, labels).mean())


def classes(outputs: Array) -> Array:
    """Return where the largest output lies, see ``agreement``; -1 where one is NaN."""
    scores = np.asarray(outputs)
    axis = 1 if scores.ndim >= 4 and scores.shape[1] <= scores.shape[-1] else -1
    if scores.ndim < 2 or scores.shape[axis] < 2:
        raise DataError(
            f"agreement wants scores of two classes or more, not {list(scores.shape)}",
            hint="another output (--output), or mse against the reference",
        )
    return np.where(np.isnan(scores).any(axis), -1, np.argmax(scores, axis))


METRICS: dict[str, Function] = {
    "top1": top1,
    "top5": top5,
    "f1": f1,
    "mse": mse,
    "psnr": psnr,
    "spearman": spearman,
    "agreement": agreement,
}
LOWER_IS_BETTER = frozenset({"mse"})


def metric_of(name: str, labels: Array | None = None) -> Metric:
    """Return a metric of ``METRICS`` in its parts.

    Args:
        name: one of ``METRICS``.
        labels: all labels; the peak of ``psnr`` is read from them.

    Raises:
        UsageError: there is no metric of that name.
    """
    match name:
        case "top1" | "top5":
            k = int(name[3:])
            check = _check_classes
            return Metric(name, lambda o, t: _top(o, t, k), share=True, check=check)
        case "f1":
            return Metric(
                name,
                keep=_predicted,
                final=_threshold,
                whole=_macro_f1,
                share=True,
                check=_check_f1,
            )
        case "mse":
            return Metric(name, lambda o, t: _squares(o, t, name), higher_is_better=False)
        case "psnr":
            peak = 1.0 if labels is None else _peak(labels)
            return Metric(name, lambda o, t: _psnr(o, t, peak))
        case "spearman":
            return Metric(name, keep=_one_number, whole=spearman)
        case "agreement":
            return Metric(name, _agreement, share=True)
    hint = nearest(name, METRICS)
    if not hint.startswith("did you mean"):
        hint += "; or your own, module:function"
    raise UsageError(f"unknown metric '{name}'", hint=hint)


def _top(outputs: Array, labels: Array, k: int) -> Array:
    """Per sample the share of its positions whose label is among the ``k`` largest outputs."""
    scores, truth = np.asarray(outputs), np.asarray(labels)
    _check_classes(scores, truth)
    scores, truth = _without_ones(scores), _without_ones(truth)
    if truth.shape != _positions(scores) or not truth.size:
        raise _shapes(f"top{k}", outputs, labels)
    count = scores.shape[1]
    scores = np.moveaxis(scores, 1, -1).reshape(-1, count)
    flat = truth.reshape(-1, 1).astype(np.int64)
    best = np.argsort(-scores.astype(np.float64), axis=1, kind="stable")[:, :k]
    hit = (best == flat).any(axis=1) & ~np.isnan(scores).any(axis=1)
    return np.asarray(hit.reshape(len(truth), -1).mean(axis=1))


def _check_classes(outputs: Array, labels: Array) -> None:
    """Raise where ``labels`` are no class numbers of these outputs."""
    _check_numbers(labels)
    scores = _without_ones(np.asarray(outputs))
    if scores.ndim < 2:
        raise DataError(
            f"the output {list(np.shape(outputs))} has no scores per class",
            hint="another output (--output), or f1 for one number per sample",
        )
    _check_range(labels, scores.shape[1])


def _check_numbers(labels: Array) -> None:
    if labels.dtype.kind not in "iub":
        hint = "top1, top5 and f1 want class numbers; mse, psnr and spearman take other numbers"
        raise DataError(f"labels must be class numbers, not {labels.dtype}", hint=hint)


def _check_range(labels: Array, count: int) -> None:
    if labels.size and (labels.min() < 0 or labels.max() >= count):
        raise DataError(
            f"labels go from {labels.min()} to {labels.max()}, the model has {count} classes"
        )


def _check_f1(outputs: Array, labels: Array) -> None:
    _check_numbers(labels)
    scores = _without_ones(np.asarray(outputs))
    _check_range(labels, scores.shape[1] if scores.ndim > 1 else 2)


def _predicted(outputs: Array) -> Array:
    """Return the predicted class per position, -1 at NaN; the numbers themselves where one is given."""
    scores = _without_ones(np.asarray(outputs))
    if scores.ndim < 2:
        return scores.astype(np.float64)
    return np.where(np.isnan(scores).any(1), -1, np.argmax(scores, 1))


def _threshold(predicted: Array) -> Array:
    """Return two classes for one number per sample, see ``f1``; classes stay."""
    if predicted.dtype.kind != "f":
        return predicted
    known = predicted[~np.isnan(predicted)]
    probabilities = bool(((known >= 0) & (known <= 1)).all())
    return np.where(np.isnan(predicted), -1, predicted > (0.5 if probabilities else 0.0))


def _macro_f1(predicted: Array, labels: Array) -> float:
    truth = _without_ones(np.asarray(labels))
    if truth.shape != predicted.shape or not truth.size:
        raise _shapes("f1", predicted, labels)
    a, b = predicted.reshape(-1).astype(np.int64), truth.reshape(-1).astype(np.int64)
    count = int(max(a.max(), b.max())) + 1
    both = np.bincount(b[a == b], minlength=count)
    either = np.bincount(a[a >= 0], minlength=count) + np.bincount(b, minlength=count)
    present = either > 0
    return float((2 * both[present] / either[present]).mean())


def _squares(outputs: Array, labels: Array, name: str) -> Array:
    """Return the mean squared difference of each sample."""
    a, b = (_without_ones(np.asarray(x)) for x in (outputs, labels))
    if a.shape != b.shape or not a.size:
        raise _shapes(name, outputs, labels)
    gap = a.astype(np.float64) - b.astype(np.float64)
    return np.asarray((gap**2).reshape(len(gap), -1).mean(axis=1))


def _psnr(outputs: Array, labels: Array, peak: float) -> Array:
    squares = _squares(outputs, labels, "psnr")
    least = peak**2 / 10 ** (BEST_PSNR / 10)
    return np.asarray(10 * np.log10(peak**2 / np.maximum(squares, least)))


def _peak(labels: Array) -> float:
    if labels.dtype.kind in "iu":
        return 255.0
    low, high = float(np.min(labels, initial=0.0)), float(np.max(labels, initial=0.0))
    if high > 1 or low < -1:
        return 255.0
    return 2.0 if low < 0 else 1.0


def _one_number(outputs: Array) -> Array:
    numbers = np.asarray(outputs).reshape(len(outputs), -1)
    if numbers.shape[1] != 1:
        raise DataError(
            f"spearman wants one number per sample, not {list(np.shape(outputs))}",
            hint="sentence pairs: two text columns make it the cosine of their embeddings",
        )
    return numbers[:, 0].astype(np.float64)


def _agreement(outputs: Array, labels: Array) -> Array:
    """Per sample the share of positions with the same largest output."""
    scores, truth = np.asarray(outputs), np.asarray(labels)
    found = classes(scores)
    if truth.shape == scores.shape:
        truth = classes(truth)
    if truth.shape != found.shape or truth.dtype.kind not in "iu":
        raise _shapes("agreement", outputs, labels)
    same = (found == truth) & (found >= 0)
    return np.asarray(same.reshape(len(same), -1).mean(axis=1))


def _without_ones(array: Array) -> Array:
    """Drop axes of length 1, but not the samples."""
    return array.reshape([d for k, d in enumerate(array.shape) if k == 0 or d != 1])


def _positions(scores: Array) -> tuple[int, ...]:
    """The shape of the labels of ``scores``: all axes but that of the classes."""
    return tuple(d for k, d in enumerate(scores.shape) if k != 1)


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse])


def _shapes(name: str, outputs: Array, labels: Array) -> DataError:
    return DataError(
        f"{name}: outputs {list(np.shape(outputs))} and labels {list(np.shape(labels))} "
        "do not belong together"
    )
