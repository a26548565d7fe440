"""Where two models part: the tensors inside their graphs, compared on the same feeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from effdl.data.feeds import Feeds, nbytes
from effdl.errors import DataError, EffdlError
from effdl.graph import io
from effdl.measure.counterparts import Pair, counterparts, maker, reading, reads
from effdl.measure.fidelity import Comparison, fit
from effdl.measure.isolate import Source, Step, alone, effects
from effdl.measure.taps import chunks, sizes, tapped
from effdl.report import LocateReport, OutputError, TensorError
from effdl.runtime.target import Target

MAX_BYTES = 256 << 20
"""Bytes of tensors that one run of both models may return."""
_BETTER = 0.25
"""An alternative counterpart has to have at most this share of the error of the one by name."""


def locate(
    reference: ir.Model | Path,
    candidate: ir.Model | Path,
    feeds: Feeds,
    target: Target | None = None,
    *,
    rtol: float | None = None,
    top: int | None = 10,
    optimize: bool = False,
    max_bytes: int = MAX_BYTES,
) -> LocateReport:
    """Find the first tensor at which two models part, and the nodes where most error arises.

    Both run with the tensors that ``counterparts`` pairs as outputs, so many at a time as fit into
    ``max_bytes``. Quantized tensors are compared as the nodes behind them read them. A tensor that
    differs while all that follows from it agrees is not counted: it only means something else now.

    Args:
        reference: the model that is right.
        candidate: the other one.
        feeds: inputs for the reference.
        target: where to run both; this machine's CPU when None.
        rtol: relative tolerance, by dtype when None, see ``compare_outputs``.
        top: how many jumps, all when None.
        optimize: at ORT_ENABLE_ALL, where fetching a tensor keeps ONNX Runtime from fusing around
            it; False: both graphs as they are written, where it changes nothing.
        max_bytes: see above.

    Raises:
        ModelError: one of them does not load or run, or the candidate takes other inputs.
        DataError: there are no feeds.
    """
    if len(feeds) == 0:
        raise DataError("there is no sample to compare on", where=feeds.source)
    run = _Run(
        _loaded(reference), _loaded(candidate), feeds, target, rtol, top, optimize, max_bytes
    )
    first, jumps, notes = run.find()
    return LocateReport(
        reference=str(reference) if isinstance(reference, Path) else "",
        candidate=str(candidate) if isinstance(candidate, Path) else "",
        feeds=len(feeds),
        source=feeds.source,
        real=feeds.real,
        first=first,
        jumps=jumps,
        compared=len(run.found),
        unmatched=run.unmatched,
        optimized=optimize,
        notes=notes,
    )


def worst(report: LocateReport, n: int) -> list[tuple[str, str, float]]:
    """Return the ``n`` nodes that hurt the outputs most: name, op type, and that error.

    The names are those of the reference; of a step that goes over several nodes, the last one. The
    error is that of the worst output when nothing else is the candidate's.
    """
    return [(j.node or j.tensor, j.op_type, j.effect or 0.0) for j in report.jumps[:n]]


def first_divergence(
    reference: ir.Model | Path,
    candidate: ir.Model | Path,
    feeds: Feeds,
    target: Target | None = None,
) -> str:
    """Say in one sentence where two models part; empty when it cannot be told.

    For the message of a check that failed: a model that does not run with its inner tensors as
    outputs is no second fault, so nothing is raised for it.
    """
    try:
        report = locate(reference, candidate, feeds.first(1), target, top=0)
    except EffdlError:
        return ""
    return "" if report.first is None else sentence(report.first)


def sentence(first: TensorError) -> str:
    """Say where two models part: the tensor, the nodes that make it, and the jump of the error."""
    made = f"{first.op_type} '{first.node}'" if first.op_type else "a graph input"
    if (first.other_node, first.other_op) != (first.node, first.op_type) and first.other_op:
        made += f" (in the candidate {first.other_op} '{first.other_node}')"
    if first.reason:
        return f"first at '{first.tensor}', made by {made}: {first.reason}"
    before = max((e for _, e in first.inputs), default=0.0)
    return (
        f"first at '{first.tensor}', made by {made}: "
        f"relative error {first.error:.2g}, {before:.2g} in what it reads"
    )


def _loaded(model: ir.Model | Path) -> ir.Model:
    return model if isinstance(model, ir.Model) else io.load(model)


@dataclass(frozen=True)
class _Found:
    """A pair and how far it is apart.

    Args:
        comparable: False where shape or type differ.
        dtype: what the candidate's nodes read it as.
    """

    value: ir.Value
    other: ir.Value
    error: OutputError
    comparable: bool
    dtype: np.dtype[Any]


class _Run:
    """One search; see ``locate`` for the arguments."""

    def __init__(
        self,
        reference: ir.Model,
        candidate: ir.Model,
        feeds: Feeds,
        target: Target | None,
        rtol: float | None,
        top: int | None,
        optimize: bool,
        max_bytes: int,
    ) -> None:
        self.reference = reference
        self.candidate = candidate
        self.feeds = feeds
        self.target = target
        self.rtol = rtol
        self.top = top
        self.optimize = optimize
        self.max_bytes = max_bytes
        self.pairs, lost = counterparts(reference, candidate)
        self.unmatched = len(lost)
        self.found: dict[ir.Value, _Found] = {}
        self.size: dict[str, int] = {}

    def find(
        self,
    ) -> tuple[TensorError | None, tuple[TensorError, ...], tuple[str, ...]]:
        """Return the first tensor beyond tolerance, the jumps and what was left out."""
        notes = self._measure()
        known = set(self.found)
        order = {value: k for k, value in enumerate(self.found)}
        moved = _rearranged(self.found, {v: _before(v, known) for v in known})
        if moved:
            notes.append(
                f"{len(moved)} tensor{'s' * (len(moved) > 1)} left out that differ while what "
                f"follows from them agrees, such as '{min(moved, key=order.__getitem__).name}'"
            )
        usable = {v for v, f in self.found.items() if f.comparable and v not in moved}
        shown = [v for v in self.found if v not in moved]
        before = {v: _before(v, usable) for v in shown}
        errors = {v: self._error(self.found[v], before[v]) for v in shown}
        first = next((v for v in shown if not errors[v].equal), None)
        told = {} if self.top == 0 else self._jumps(errors, usable, before, first)
        jumps = [e for e in told.values() if e.effect]
        report = None if first is None else told.get(first, errors[first])
        return report, tuple(jumps[: self.top]), tuple(notes)

    def _jumps(
        self,
        errors: Mapping[ir.Value, TensorError],
        usable: set[ir.Value],
        before: Mapping[ir.Value, Sequence[ir.Value]],
        first: ir.Value | None,
    ) -> dict[ir.Value, TensorError]:
        """Return the steps that hurt most with what they do alone, most first, and ``first``.

        All are tried on one feed, those that hurt most then on all of them.
        """
        steps = {
            v: self._step(v, before[v])
            for v in errors
            if v in usable and errors[v].error > 0 and self.found[v].dtype.kind == "f"
        }
        if not steps:
            return {}
        where = (self.reference, self.candidate)
        some = list(steps.values())
        screen = effects(*where, some, self.feeds.first(1), self.target, max_bytes=self.max_bytes)
        ranked = sorted(steps, key=lambda v: -screen[v])
        shortlist = dict.fromkeys([*ranked[: self.top], *([first] if first in steps else [])])
        some = [steps[v] for v in shortlist if v is not None]
        own = alone(*where, some, self.feeds, self.target, max_bytes=self.max_bytes)
        effect = effects(*where, some, self.feeds, self.target, max_bytes=self.max_bytes)
        return {
            v: replace(errors[v], effect=effect[v], alone=own[v].error, unrounded=own[v].unrounded)
            for v in sorted(effect, key=lambda v: -effect[v])
        }

    def _measure(self) -> list[str]:
        """Compare all pairs; returns notes on what was left out."""
        inside = [p for p in self.pairs if p.value.producer() is not None]
        fed = [p for p in self.pairs if p.value.producer() is None]
        fetched = {p.value.name or "": p for p in inside}
        everything = [*fetched, *(a.name or "" for p in inside for a in p.alternatives)]
        largest = max(self.feeds, key=nbytes)
        self.size = sizes(self.reference, list(dict.fromkeys(everything)), largest, self.target)
        notes = [f"{len(fetched.keys() - self.size)} tensors left out whose type numpy has not"]
        both = {
            n: 2 * self.size[n]
            + sum(self.size.get(a.name or "", 0) for a in fetched[n].alternatives)
            for n in fetched
            if n in self.size
        }
        if fed:
            self._compare(fed)
        for chunk in chunks(list(both), both, self.max_bytes):
            self._compare([fetched[n] for n in chunk])
        for what, model in (("reference", self.reference), ("candidate", self.candidate)):
            hidden = _hidden(model)
            if hidden:
                notes.append(f"{hidden} tensors inside the {what}'s subgraphs are out of reach")
        return [n for n in notes if not n.startswith("0 ")]

    def _compare(self, pairs: Sequence[Pair]) -> None:
        """Run both models on every feed with these pairs as outputs."""
        mine = {p: [p.value, *self._fitting(p.alternatives)] for p in pairs}
        left = self._open(self.reference, [v for values in mine.values() for v in values])
        right = self._open(self.candidate, [p.other for p in pairs])
        sums = Comparison(self.rtol, casts=True)
        odd: set[str] = set()
        dtypes: dict[Pair, np.dtype[Any]] = {}
        for feed in self.feeds:
            given, given_other = fit(feed, left), fit(feed, right)
            a = given | left.run(given)
            b = given_other | right.run(given_other)
            for k, pair in enumerate(pairs):
                other = _read(pair.other, b)
                dtypes[pair] = np.asarray(other).dtype
                for j, value in enumerate(mine[pair]):
                    array, key = _read(value, a), f"{k}.{j}"
                    if _alike(array, other):
                        sums.add({key: array}, {key: other})
                    elif j == 0:
                        odd.add(key)
                        sums.add({key: array}, {key: other})
                    else:
                        odd.add(key)
        errors = {e.name: e for e in sums.result()}
        for k, pair in enumerate(pairs):
            index = _best([f"{k}.{j}" for j in range(len(mine[pair]))], errors, odd)
            key, value = f"{k}.{index}", mine[pair][index]
            found = _Found(value, pair.other, errors[key], key not in odd, dtypes[pair])
            self.found.setdefault(value, found)

    def _fitting(self, values: Iterable[ir.Value]) -> list[ir.Value]:
        return [v for v in values if (v.name or "") in self.size]

    def _open(self, model: ir.Model, values: Iterable[ir.Value]) -> Any:
        names = [reading(v).value.name or "" for v in values if reading(v).value.producer()]
        return tapped(model, names, self.target, optimize=self.optimize)

    def _step(self, value: ir.Value, before: Sequence[ir.Value]) -> Step:
        found = [self.found[i] for i in before]
        nbytes = sum(self.size.get(v.name or "", 0) for v in [value, *(f.value for f in found)])
        sources = tuple(Source(f.value, f.other, f.dtype) for f in found)
        return Step(value, self.found[value].other, sources, nbytes)

    def _error(self, found: _Found, before: Sequence[ir.Value]) -> TensorError:
        node, other = maker(found.value), maker(found.other)
        error = found.error
        return TensorError(
            tensor=found.value.name or "",
            node=node.name or "" if node is not None else "",
            op_type=node.op_type if node is not None else "",
            other=found.other.name or "",
            other_node=other.name or "" if other is not None else "",
            other_op=other.op_type if other is not None else "",
            error=error.rel_l2,
            max_abs=error.max_abs,
            tolerance=error.tolerance,
            equal=error.equal,
            inputs=tuple((i.name or "", self.found[i].error.rel_l2) for i in before),
            nodes=_between(found.value, set(before)),
            readers=tuple(n.name or "" for n in dict.fromkeys(u.node for u in found.value.uses())),
            reason=error.reason,
        )


def _read(value: ir.Value, fetched: Mapping[str, Any]) -> Any:
    how = reading(value)
    return how.number(fetched[how.value.name or ""])


def _alike(a: Any, b: Any) -> bool:
    """Whether two tensors can be subtracted."""
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
        return False
    return a.shape == b.shape and (a.dtype == b.dtype or {a.dtype.kind, b.dtype.kind} == {"f"})


def _before(value: ir.Value, known: set[ir.Value]) -> tuple[ir.Value, ...]:
    """Return the nearest tensors of ``known`` that ``value`` is computed from, in order."""
    found: dict[ir.Value, None] = {}
    seen: set[ir.Value] = set()
    node = value.producer()
    todo = [] if node is None else list(reads(node))[::-1]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in known:
            found[current] = None
        elif (producer := current.producer()) is not None:
            todo += list(reads(producer))[::-1]
    return tuple(found)


def _best(keys: Sequence[str], errors: Mapping[str, OutputError], odd: set[str]) -> int:
    """Return the place of the counterpart: the first, or an alternative that fits far better."""
    best, limit = 0, _BETTER * errors[keys[0]].rel_l2
    for j, key in enumerate(keys[1:], 1):
        if key in errors and key not in odd and errors[key].rel_l2 < limit:
            best, limit = j, errors[key].rel_l2
    return best


def _rearranged(
    found: Mapping[ir.Value, _Found], before: Mapping[ir.Value, tuple[ir.Value, ...]]
) -> set[ir.Value]:
    """Return the tensors that mean something else now: they differ, and nothing behind sees it.

    One of another shape counts as such as soon as what follows from it has the same shape again.
    """
    after: dict[ir.Value, list[ir.Value]] = {}
    for value, inputs in before.items():
        for i in inputs:
            after.setdefault(i, []).append(value)
    moved: set[ir.Value] = set()
    agrees: dict[ir.Value, bool] = {}
    fits: dict[ir.Value, bool] = {}
    for value in reversed(list(found)):
        f, followers = found[value], after.get(value, [])
        agrees[value], fits[value] = f.error.equal, f.comparable
        if f.error.equal or not followers or value.is_graph_output():
            continue
        same = all(agrees[v] for v in followers)
        if same or (not f.comparable and all(fits[v] for v in followers)):
            moved.add(value)
            agrees[value], fits[value] = same, True
    return moved


def _between(value: ir.Value, known: set[ir.Value]) -> tuple[str, ...]:
    """Return the names of the nodes that make ``value`` from ``known``, in the order of the graph."""
    found: dict[ir.Node, None] = {}
    todo = [value]
    while todo:
        node = todo.pop().producer()
        if node is None or node in found:
            continue
        found[node] = None
        todo += [v for v in reads(node) if v not in known]
    return tuple(n.name or n.op_type for n in reversed(found))


def _hidden(model: ir.Model) -> int:
    """Count the tensors inside the bodies of If, Loop and Scan."""
    return sum(len(n.outputs) for g in model.graph.subgraphs() for n in g)
