"""The error of single steps of a model: what they do when they are given the reference's tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from effdl.data.feeds import Feed, Feeds
from effdl.graph.clean import cut
from effdl.graph.walk import is_op
from effdl.graph.weights import Names
from effdl.measure.counterparts import reading, rounds, unrounded
from effdl.measure.fidelity import fit
from effdl.measure.fidelity_outputs import Comparison
from effdl.measure.taps import chunks, tapped
from effdl.runtime.session import Session, open_session
from effdl.runtime.target import Target

Say = Callable[[str, str], None]


@dataclass(frozen=True)
class Source:
    """A tensor that a step reads.

    Args:
        value: of the reference; ``other`` of the candidate.
        dtype: what the candidate's nodes read it as.
    """

    value: ir.Value
    other: ir.Value
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Step:
    """What lies between some tensors and the next one that both models have.

    Args:
        value: the tensor it makes in the reference; ``other`` in the candidate.
        sources: what it reads; graph inputs need not be among them.
        nbytes: of all these tensors on the largest feed.
    """

    value: ir.Value
    other: ir.Value
    sources: tuple[Source, ...]
    nbytes: int

    @property
    def name(self) -> str:
        """The tensor's name in the reference."""
        return self.value.name or ""


@dataclass(frozen=True)
class Alone:
    """Relative L2 errors of a step by itself.

    Args:
        error: of its result.
        unrounded: of its result before that is rounded to its quantized type; None if it is not.
    """

    error: float
    unrounded: float | None


def alone(
    reference: ir.Model,
    candidate: ir.Model,
    steps: Sequence[Step],
    feeds: Feeds,
    target: Target | None,
    *,
    max_bytes: int,
) -> dict[ir.Value, Alone]:
    """Measure the error of steps by themselves, both graphs as they are written.

    The candidate is cut before each step: its nodes read new graph inputs there, which are fed with
    the reference's tensors. So a step's own error is told from what it was handed on.

    Args:
        reference: the model that is right.
        candidate: the other one; neither is changed.
        steps: what to measure.
        feeds: inputs for the reference.
        target: where to run.
        max_bytes: of tensors that are in memory at a time.

    Returns:
        The errors by the reference's tensor.

    Raises:
        ModelError: ONNX Runtime cannot load or run the model.
    """
    found: dict[ir.Value, Alone] = {}
    for chunk in _chunks(steps, max_bytes):
        sums, rough = Comparison(casts=True, classes=False), Comparison(casts=True, classes=False)
        for results in _results(reference, candidate, chunk, feeds, target):
            for step, result in zip(chunk, results, strict=True):
                sums.add({step.name: result.want}, {step.name: result.got})
                if result.unrounded is not None:
                    rough.add({step.name: result.want}, {step.name: result.unrounded})
        errors = {e.name: e.rel_l2 for e in sums.result()}
        before = {e.name: e.rel_l2 for e in rough.result()}
        found |= {s.value: Alone(errors[s.name], before.get(s.name)) for s in chunk}
    return found


def effects(
    reference: ir.Model,
    candidate: ir.Model,
    steps: Sequence[Step],
    feeds: Feeds,
    target: Target | None,
    *,
    max_bytes: int,
    say: Callable[[int, int], None],
) -> dict[ir.Value, float]:
    """Measure what steps do to the outputs by themselves: nothing else is the candidate's.

    The reference runs once per step and feed, with the step's own error added to the tensor. Only
    floating-point tensors have one.

    Args:
        reference, candidate, steps, feeds, target, max_bytes: as in ``alone``.
        say: told how many steps are done, and of how many.

    Returns:
        The relative L2 error of the worst graph output, by the reference's tensor.

    Raises:
        ModelError: ONNX Runtime cannot load or run the model.
    """
    session, inputs = _nudged(reference, [s.value for s in steps], target)
    zeros = {name: np.zeros((), dtype) for name, dtype in inputs.values()}
    right = [_outputs(session, feed | zeros) for feed in feeds]
    sums = {s.value: _Gap() for s in steps}
    done = 0
    for chunk in _chunks(steps, max_bytes):
        runs = _results(reference, candidate, chunk, feeds, target)
        for feed, want, results in zip(feeds, right, runs, strict=True):
            for k, (step, result) in enumerate(zip(chunk, results, strict=True)):
                say(done + k + 1, len(steps))
                name, dtype = inputs[step.value]
                gap = result.got.astype(np.float64) - result.want.astype(np.float64)
                if gap.any():
                    wrong = _outputs(session, feed | zeros | {name: gap.astype(dtype)})
                    sums[step.value].add(want, wrong)
        done += len(chunk)
    return {value: gap.worst() for value, gap in sums.items()}


class _Gap:
    """The relative L2 error of each output over several runs: a Comparison's, without the rest."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, want: dict[str, Any], got: dict[str, Any]) -> None:
        for name, right in want.items():
            if not isinstance(right, np.ndarray) or right.dtype.kind not in "fiub":
                continue
            a, b = right.astype(np.float64).ravel(), got[name].astype(np.float64).ravel()
            sums = self._sums.setdefault(name, [0.0, 0.0])
            same = a == b  # infinities that agree
            gap = np.where(same, 0.0, a - b)
            a = np.where(same & ~np.isfinite(a), 0.0, a)
            sums[0] += float(gap @ gap)
            sums[1] += float(a @ a)

    def worst(self) -> float:
        """Return that of the worst output, infinite where it is no number."""
        errors = [math.sqrt(d / r) if r else math.inf for d, r in self._sums.values() if d]
        return max((e if math.isfinite(e) else math.inf for e in errors), default=0.0)


def _chunks(steps: Sequence[Step], max_bytes: int) -> Iterator[list[Step]]:
    by_name = {s.name: s for s in steps}
    for names in chunks(list(by_name), {n: 2 * s.nbytes for n, s in by_name.items()}, max_bytes):
        yield [by_name[n] for n in names]


@dataclass(frozen=True)
class _Result:
    """What a step makes of the reference's tensors, in both models."""

    want: Any
    got: Any
    unrounded: Any


def _results(
    reference: ir.Model,
    candidate: ir.Model,
    steps: Sequence[Step],
    feeds: Feeds,
    target: Target | None,
) -> Iterator[list[_Result]]:
    """Yield the results of the steps, feed by feed."""
    sources = list({s.other: s for step in steps for s in step.sources}.values())
    whole = [s.value for s in steps] + [s.value for s in sources]
    left = tapped(reference, _names(whole), target, optimize=False)
    before = {s: unrounded(s.other) for s in steps if _is_rounded(s.other)}
    names = _names([s.other for s in steps]) + [v.name or "" for v in before.values()]
    right, inputs = _cut(candidate, sources, names, target)
    for feed in feeds:
        a = _run(left, feed)
        given = {inputs[s.other]: _read(s.value, a).astype(s.dtype, copy=False) for s in sources}
        b = _run(right, feed | given)
        yield [
            _Result(
                _read(s.value, a),
                _read(s.other, b),
                b[before[s].name or ""] if s in before else None,
            )
            for s in steps
        ]


def _run(session: Session, feed: Feed) -> dict[str, Any]:
    """Run, and return outputs and graph inputs by name."""
    fitted = fit(feed, session)
    return {**fitted, **session.run(fitted)}


def _outputs(session: Session, feed: Feed) -> dict[str, Any]:
    """Run, and return the outputs by their place."""
    return {str(k): v for k, v in enumerate(session.run(fit(feed, session)).values())}


def _nudged(
    model: ir.Model, values: Sequence[ir.Value], target: Target | None
) -> tuple[Session, dict[ir.Value, tuple[str, np.dtype[Any]]]]:
    """Open a copy in which something can be added to each of ``values``, through a new graph input.

    Returns the session, and name and dtype of the new inputs.
    """
    dtypes = {
        p.name: p.dtype
        for p in tapped(model, _made(values), target, optimize=False).outputs
        if p.dtype is not None
    }
    dtypes |= {v.name or "": v.dtype.numpy() for v in values if v.producer() is None and v.dtype}
    copy = model.clone()
    here = {v.name: v for v in copy.graph.inputs}
    here |= {o.name: o for n in copy.graph for o in n.outputs}
    names = Names(copy)
    inputs = {}
    for value in values:
        old, dtype = here[value.name], dtypes[value.name or ""]
        kind = ir.TensorType(ir.DataType.from_numpy(dtype))
        extra = ir.Value(name=names.fresh(f"{old.name}_error"), type=kind)
        node = ir.node("Add", [old, extra], name=names.fresh(f"{old.name}_nudged"))
        new = node.outputs[0]
        new.name, new.type, new.shape = names.fresh(f"{old.name}_nudged"), kind, old.shape
        for user, index in list(old.uses()):
            if user is not node:
                user.replace_input_with(index, new)
        for k, output in enumerate(copy.graph.outputs):
            if output is old:
                copy.graph.outputs[k] = new
        producer = old.producer()
        if producer is not None:
            copy.graph.insert_after(producer, node)
        else:
            copy.graph.insert_before(copy.graph[0], node)
        copy.graph.inputs.append(extra)
        inputs[value] = (extra.name or "", dtype)
    return open_session(copy, target), inputs


def _made(values: Sequence[ir.Value]) -> list[str]:
    return [v.name or "" for v in values if v.producer() is not None]


def _cut(
    model: ir.Model,
    sources: Sequence[Source],
    results: Sequence[str],
    target: Target | None,
) -> tuple[Session, dict[ir.Value, str]]:
    """Open a copy whose nodes read new graph inputs instead of ``sources``; returns their names."""
    copy = model.clone()
    values = {v.name or "": v for v in copy.graph.inputs}
    values |= {o.name: o for n in copy.graph for o in n.outputs if o.name}
    fetched = [values[n] for n in dict.fromkeys(results)]
    names = Names(copy)
    fresh: dict[ir.Value, str] = {}
    for source in sources:
        old = values[source.other.name or ""]
        new = ir.Value(
            name=names.fresh(f"{old.name}_given"),
            type=ir.TensorType(ir.DataType.from_numpy(source.dtype)),
        )
        for user, index in _read_points(old):
            user.replace_input_with(index, new)
        copy.graph.inputs.append(new)
        fresh[source.other] = new.name or ""
    cut(copy, fetched)  # what is before the sources need not run
    return open_session(copy, target, optimize=False), fresh


def _read_points(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Yield where ``value`` is read, behind its rounding where it is rounded."""
    for user, index in list(value.uses()):
        behind = (
            _restored(user.outputs[0]) if index == 0 and rounds(user, "QuantizeLinear") else None
        )
        if behind is None:
            yield user, index
            continue
        for restored in behind:
            yield from list(restored.uses())


def _restored(quantized: ir.Value) -> list[ir.Value] | None:
    """Return what all readers of a quantized tensor make of it; None when one reads the integers."""
    found = []
    for reader, place in quantized.uses():
        if place == 0 and rounds(reader, "DequantizeLinear"):
            found.append(reader.outputs[0])
        elif is_op(reader, "Identity") and (more := _restored(reader.outputs[0])) is not None:
            found += more
        else:
            return None
    return found


def _is_rounded(value: ir.Value) -> bool:
    if value.producer() is None:
        return False  # a graph input: what it was before is the feed
    return reading(value).value is not value or unrounded(value) is not value


def _names(values: Sequence[ir.Value]) -> list[str]:
    return [
        how.value.name or ""
        for how in (reading(v) for v in values)
        if how.value.producer() is not None
    ]


def _read(value: ir.Value, fetched: dict[str, Any]) -> Any:
    how = reading(value)
    return how.number(fetched[how.value.name or ""])
