"""A task metric of a model on labelled samples, as ONNX Runtime computes it, and what changed in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.data.custom import custom_metric
from effdl.data.dataset import Dataset
from effdl.data.feeds import Feeds
from effdl.data.metrics import Metric, classes, metric_of
from effdl.errors import DataError, EffdlError, ModelError, UsageError, nearest
from effdl.measure.fidelity import fit
from effdl.runtime.session import Port, Session, open_session
from effdl.runtime.target import Target
from effdl.solve.paired import (
    Interval,
    bootstrap,
    bootstrap_mean,
    mean_interval,
    paired_difference,
)

__all__ = [
    "Difference",
    "Scored",
    "difference",
    "evaluate",
    "paired_difference",
    "reference_labels",
    "score_interval",
    "score_model",
]

Array = npt.NDArray[Any]
Progress = Callable[[float], None]
"""Called with the share of the samples that is done."""


@dataclass(frozen=True, eq=False)
class Scored:
    """A model's score with what is needed to compare it with another's on the same samples.

    Args:
        metric: its name; ``higher_is_better`` and ``share`` as in ``data.metrics.Metric``.
        value: the score.
        count: samples.
        output: the graph output that was scored.
        samples: a score per sample, whose mean is the score; None where it is no mean.
        kept, labels, whole: the score of some samples is ``whole(kept[i], labels[i])``.
    """

    metric: str
    value: float
    count: int
    output: str
    higher_is_better: bool = True
    share: bool = False
    samples: Array | None = None
    kept: Array | None = None
    labels: Array | None = None
    whole: Callable[[Array, Any], Any] | None = None

    def of(self, indices: Array) -> float:
        """Return the score of some samples, which may repeat."""
        if self.samples is not None:
            return float(self.samples[indices].mean())
        assert self.whole is not None
        assert self.kept is not None
        labels = self.labels[indices] if self.labels is not None else None
        return float(self.whole(self.kept[indices], labels))


@dataclass(frozen=True)
class Difference:
    """By how much a score rose on the same samples.

    Args:
        value: score after less score before; ``low`` and ``high`` bound it with 95 % confidence.
        verdict: ``better`` or ``worse`` where the interval excludes 0, else ``same``: no measurable
            difference.
    """

    value: float
    low: float
    high: float
    verdict: str


def score_model(
    model: ir.Model | Path,
    dataset: Dataset,
    metric: str,
    target: Target | None = None,
    *,
    output: str | None = None,
    progress: Progress | None = None,
) -> Scored:
    """Run a model over labelled samples and score one of its outputs.

    Feeds run as they are, not joined to larger batches: a model that quantizes dynamically gives other
    results when samples share a batch. Of metrics that are means of samples only the samples' scores
    stay in memory, not the outputs.

    Args:
        model: the model.
        dataset: samples with their labels.
        metric: a name of ``data.metrics.METRICS``, or ``module:function``.
        target: where to run; this machine's CPU when None.
        output: which graph output, shape [batch, ...]; the first when None.
        progress: told how far it is.

    Raises:
        UsageError: an unknown metric or output.
        DataError: no labels, or not as many as the model gives results, or of another kind.
        ModelError: the model does not load or run.
    """
    how = custom_metric(metric) if ":" in metric else metric_of(metric, dataset.labels)
    if len(dataset.feeds) == 0:
        raise DataError("there is no sample to evaluate on", where=dataset.source)
    if how.needs_labels and dataset.labels is None:
        hint = dataset.why_unlabelled or f"{metric} compares outputs with labels"
        raise DataError("the data has no labels", hint=hint, where=dataset.source)
    session = open_session(model, target)
    name = _output(session.outputs, output)
    run = _Run(session, name, dataset, how)
    try:
        return run.score(progress or (lambda share: None))
    except EffdlError as e:
        if isinstance(e, DataError):
            e.where = e.where or dataset.source
        raise


def evaluate(
    model: ir.Model | Path,
    feeds: Feeds,
    labels: Array,
    metric: str,
    target: Target | None = None,
    output: str | None = None,
) -> float:
    """Run every feed and return ``metric`` of one output against the labels.

    Args:
        model: the model.
        feeds: one sample or batch of samples each, in the order of the labels.
        labels: one per sample, shape [samples, ...].
        metric, target, output: as in ``score_model``, and so are the errors.
    """
    dataset = Dataset(feeds, labels, feeds.source)
    return score_model(model, dataset, metric, target, output=output).value


def reference_labels(
    model: ir.Model | Path,
    dataset: Dataset,
    metric: str,
    target: Target | None = None,
    *,
    output: str | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Return the samples with what a reference model gives as their labels.

    Args:
        model: the reference.
        dataset: the samples; labels of their own are left out.
        metric: for ``agreement`` only the reference's classes are kept, else its outputs.
        target, output, progress: as in ``score_model``.
    """
    session = open_session(model, target)
    name = _output(session.outputs, output)
    how = Metric(metric, keep=classes if metric == "agreement" else np.asarray, whole=_nothing)
    bare = dataclasses.replace(dataset, labels=None)
    kept = _Run(session, name, bare, how).score(progress or (lambda share: None)).kept
    return dataclasses.replace(dataset, labels=kept)


def difference(before: Scored, after: Scored, seed: int = 0) -> Difference:
    """Return by how much the score rose from one model to another, with a paired confidence interval.

    Args:
        before: the score of the first model.
        after: that of the other on the same samples.
        seed: of the resampling.

    Raises:
        ValueError: these are not scores of one metric on as many samples.
    """
    if before.metric != after.metric or before.count != after.count:
        raise ValueError("scores of different metrics or samples cannot be compared")
    if before.samples is not None and after.samples is not None:
        scores = (before.samples, after.samples)
        found = (
            paired_difference(*scores, seed)
            if before.share  # an error of 0 is no wrong answer
            else bootstrap_mean(scores[1] - scores[0], seed)
        )
    else:
        found = bootstrap(lambda i: after.of(i) - before.of(i), before.count, seed)
    low, high = (found.low, found.high) if before.higher_is_better else (-found.high, -found.low)
    verdict = "better" if low > 0 else "worse" if high < 0 else "same"
    if np.isnan(after.value) and not np.isnan(before.value):
        verdict = "worse"
    return Difference(found.value, found.low, found.high, verdict)


def score_interval(scored: Scored, seed: int = 0) -> Interval:
    """Return the score with its 95 % confidence interval over samples."""
    if scored.samples is None:
        return bootstrap(scored.of, scored.count, seed)
    if scored.share:
        return mean_interval(scored.samples, seed)
    return bootstrap_mean(scored.samples, seed)


class _Run:
    """One model going over the samples."""

    def __init__(self, session: Session, output: str, dataset: Dataset, metric: Metric) -> None:
        self.session = session
        self.output = output
        self.dataset = dataset
        self.metric = metric
        self.kept: list[Array] = []
        self.count = 0
        self.per_result = 1  # feeds per result: two where each is a sentence of a pair
        self.whole_runs = False  # a run's output is one sample, without an axis for it

    def score(self, progress: Progress) -> Scored:
        waiting: list[Array] = []  # embeddings whose partner has not been run yet
        for done, feed in enumerate(self.dataset.feeds, 1):
            values = self.session.run(fit(feed, self.session))
            results = _batch(values[self.output], self.output)
            if self.dataset.pairs:
                waiting.append(results)
                results = np.concatenate(waiting)
                if len(results) % 2:
                    continue
                self.per_result = len(waiting)
                waiting.clear()
                results = _cosine(results, self.output)
            if not self.kept:
                self._first(results)
            self._add(results[None] if self.whole_runs else results)
            progress(done / len(self.dataset.feeds))
        return self._result()

    @property
    def _runs(self) -> int:
        return len(self.dataset.feeds) // self.per_result

    def _first(self, results: Array) -> None:
        """Look whether labels and results can belong together before all samples are run."""
        labels = self.dataset.labels
        each = len(results)
        if labels is None:
            self.whole_runs = each > 1 and results.ndim == 1 and self.metric.keep is classes
            return
        self.whole_runs = each > 1 and self._runs > 1 and len(labels) == self._runs
        if each == 1 or self.whole_runs:
            self._fit(self._runs)
        self.metric.check(results[None] if self.whole_runs else results, labels)

    def _fit(self, count: int) -> None:
        labels = self.dataset.labels
        if labels is not None and len(labels) != count:
            raise DataError(
                f"{len(labels)} labels for {count} results of output '{self.output}'",
                hint="the data needs one label per sample, and the output one result per sample",
            )

    def _add(self, results: Array) -> None:
        begin, self.count = self.count, self.count + len(results)
        if self.metric.samples is None:
            kept = self.metric.keep(results)
        else:
            labels = self.dataset.labels
            assert labels is not None
            part = labels[begin : self.count]
            if len(part) < len(results):  # what there would have been, all runs alike
                self._fit(self.count + len(results) * (self._runs - len(self.kept) - 1))
            kept = self.metric.samples(results, part)
        if self.kept and kept.shape[1:] != self.kept[0].shape[1:]:
            shapes = sorted({str(list(k.shape[1:])) for k in (self.kept[0], kept)})
            raise DataError(
                f"output '{self.output}' has a shape that depends on the sample "
                f"({', '.join(shapes)}): it cannot be scored",
                hint="name an output with one result of a fixed shape per sample",
            )
        self.kept.append(kept)

    def _result(self) -> Scored:
        metric = self.metric
        kept = metric.final(np.concatenate(self.kept))
        self._fit(len(kept))
        scored = Scored(
            metric=metric.name,
            value=float("nan"),
            count=len(kept),
            output=self.output,
            higher_is_better=metric.higher_is_better,
            share=metric.share,
        )
        if metric.samples is not None:
            return dataclasses.replace(scored, value=float(kept.mean()), samples=kept)
        assert metric.whole is not None
        value = metric.whole(kept, self.dataset.labels)
        if isinstance(value, np.ndarray):
            return dataclasses.replace(scored, value=float(value.mean()), samples=value)
        return dataclasses.replace(
            scored,
            value=float(value),
            kept=kept,
            labels=self.dataset.labels,
            whole=metric.whole,
        )


def _nothing(outputs: Array, labels: Array) -> float:
    return float("nan")


def _cosine(embeddings: Array, name: str) -> Array:
    """Return the cosine of every two rows, [pairs, 1]."""
    if embeddings.ndim != 2:
        raise DataError(
            f"output '{name}' is {list(embeddings.shape)}, a sentence embedding is [samples, width]",
            hint="another output (--output); pairs=joined for a model that takes both texts at once",
        )
    rows = embeddings.astype(np.float64)
    a, b = rows[0::2], rows[1::2]
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(axis=1) / np.maximum(norms, 1e-30))[:, None]


def _output(ports: list[Port], name: str | None) -> str:
    if name is None:
        return ports[0].name
    names = [p.name for p in ports]
    if name not in names:
        raise UsageError(f"no output '{name}'", hint=nearest(name, names))
    return name


def _batch(value: Any, name: str) -> Array:
    if not isinstance(value, np.ndarray):
        raise ModelError(f"output '{name}' is no tensor: it cannot be scored")
    return value.reshape(1) if value.ndim == 0 else value
