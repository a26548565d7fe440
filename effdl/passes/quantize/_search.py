"""Ranges chosen by what the whole 8-bit model makes of data that they were not taken from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.data.feeds import Feeds
from effdl.errors import ModelError
from effdl.passes.quantize._select import Selection
from effdl.runtime.session import open_session
from effdl.runtime.target import parse_target

Range = tuple[float, float]
Outputs = list[dict[str, npt.NDArray[np.float64]]]
_FEEDS = 8
"""Feeds that a choice is judged on."""
_GAIN = 0.995
"""A choice is taken where the error falls below this share of the best so far."""


@dataclass(frozen=True)
class Searched:
    """What came of a search.

    Args:
        ranges: of every tensor.
        before, after: relative L2 error of the outputs on the data held out.
        changed: tensors with another range than at first.
    """

    ranges: dict[str, Range]
    before: float
    after: float
    changed: tuple[str, ...]


class Judge:
    """Tells how far the outputs of 8-bit models are from those of the float model.

    Args:
        model: the float model, whose outputs are right.
        held: data that nothing was chosen by.
        threads: intra-op threads.
    """

    def __init__(self, model: ir.Model, held: Feeds, threads: int) -> None:
        self._held = held.first(_FEEDS)
        self._threads = threads
        self._wanted = _run(model, self._held, threads)

    def error(self, model: ir.Model) -> float:
        """Return the relative L2 error of a model, infinite where it cannot be compared."""
        if not self._wanted:
            return float("inf")
        return _error(self._wanted, _run(model, self._held, self._threads))


def better(error: float, than: float) -> bool:
    """Whether an error is so much smaller that it is not chance."""
    return error < _GAIN * than


def search_ranges(
    judge: Judge,
    ranges: Mapping[str, Range],
    alternatives: Sequence[tuple[str, Sequence[Range]]],
    quantize: Callable[[Mapping[str, Range]], ir.Model],
) -> Searched | None:
    """Try other ranges, tensor after tensor, and keep what lowers the error of the outputs.

    Args:
        judge: of 8-bit models.
        ranges: of every tensor, to start from.
        alternatives: other ranges by tensor, in the order in which they are tried.
        quantize: makes the 8-bit model with given ranges.

    Returns:
        None where the outputs cannot be compared.
    """
    best = dict(ranges)
    lowest = first = judge.error(quantize(best))
    if not np.isfinite(first):
        return None
    changed = []
    for name, others in alternatives:
        for other in others:
            trial = {**best, name: other}
            error = judge.error(quantize(trial))
            if better(error, lowest):
                best, lowest = trial, error
                changed.append(name)
    return Searched(best, first, lowest, tuple(dict.fromkeys(changed)))


def copy_with(model: ir.Model, chosen: Selection) -> tuple[ir.Model, Selection]:
    """Return a copy of the model with the selection of its own nodes."""
    copy = model.clone()
    twin = dict(zip(model.graph, copy.graph, strict=True))
    nodes = dict.fromkeys(twin[n] for n in chosen.nodes)
    absorbed = {twin[a]: twin[b] for a, b in chosen.absorbed.items()}
    return copy, replace(chosen, nodes=nodes, absorbed=absorbed, skipped=[])


def _run(model: ir.Model, feeds: Feeds, threads: int) -> Outputs:
    """Return the floating-point outputs, feed by feed; nothing where the model does not run."""
    found: Outputs = []
    try:
        session = open_session(model, parse_target("cpu", threads))
        for feed in feeds:
            outputs = session.run(feed)
            found.append(
                {
                    name: value.astype(np.float64)
                    for name, value in outputs.items()
                    if isinstance(value, np.ndarray) and value.dtype.kind == "f"
                }
            )
    except ModelError:
        return []
    return found


def _error(wanted: Outputs, got: Outputs) -> float:
    """Return the relative L2 error over all feeds, the mean of the outputs; infinite where one differs."""
    if not wanted or len(wanted) != len(got):
        return float("inf")
    errors = []
    for name in wanted[0]:
        total = change = 0.0
        for a, b in zip(wanted, got, strict=True):
            if name not in b or a[name].shape != b[name].shape:
                return float("inf")
            total += float(np.square(a[name]).sum())
            change += float(np.square(b[name] - a[name]).sum())
        errors.append(np.sqrt(change / total) if total else 0.0)
    error = float(np.mean(errors)) if errors else float("inf")
    return error if np.isfinite(error) else float("inf")
