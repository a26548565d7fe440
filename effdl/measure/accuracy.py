"""A task metric of a model on labelled samples, as ONNX Runtime computes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.data.feeds import Feeds
from effdl.data.metrics import METRICS
from effdl.errors import DataError, ModelError, UsageError, nearest
from effdl.measure.fidelity import fit
from effdl.runtime.session import Port, open_session
from effdl.runtime.target import Target

Array = npt.NDArray[Any]


def evaluate(
    model: ir.Model | Path,
    feeds: Feeds,
    labels: Array,
    metric: str,
    target: Target | None = None,
    output: str | None = None,
) -> float:
    """Run every feed and return ``metric`` of one output against the labels.

    Feeds run as they are, not joined to larger batches: a model that quantizes dynamically gives other
    results when samples share a batch.

    Args:
        model: the model.
        feeds: one sample or batch of samples each, in the order of the labels.
        labels: one per sample, shape [samples, ...].
        metric: a name in ``data.metrics.METRICS``.
        target: where to run; this machine's CPU when None.
        output: which graph output, shape [batch, ...]; the first when None.

    Raises:
        UsageError: an unknown metric or output.
        DataError: not as many labels as the model gives results.
        ModelError: the model does not load or run.
    """
    if metric not in METRICS:
        raise UsageError(f"unknown metric '{metric}'", hint=nearest(metric, METRICS))
    if len(feeds) == 0:
        raise DataError("there is no sample to evaluate on", where=feeds.source)
    session = open_session(model, target)
    name = _output(session.outputs, output)
    parts = [_batch(session.run(fit(feed, session))[name], name) for feed in feeds]
    if len({p.shape[1:] for p in parts}) > 1:
        shapes = sorted({str(list(p.shape[1:])) for p in parts})
        raise DataError(
            f"output '{name}' has a shape that depends on the sample ({', '.join(shapes[:3])}): "
            "it cannot be scored",
            hint="name an output with one result of a fixed shape per sample",
            where=feeds.source,
        )
    results = np.concatenate(parts)
    if len(results) != len(labels):
        raise DataError(
            f"{len(labels)} labels for {len(results)} results of output '{name}'",
            hint="the data needs one label per sample, and the output one result per sample",
            where=feeds.source,
        )
    return float(METRICS[metric](results, labels))


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
