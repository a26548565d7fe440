"""Two models run side by side with their inner tensors as outputs: which part, and which hurt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from effdl.data.feeds import Feeds, nbytes
from effdl.graph.walk import opset, subgraphs_in
from effdl.measure.counterparts import Pair, between, counterparts, maker, nearest, reading
from effdl.measure.fidelity import fit
from effdl.measure.fidelity_outputs import Comparison
from effdl.measure.isolate import Alone, Say, Source, Step, alone, effects
from effdl.measure.taps import chunks, fetchable, sizes, tapped
from effdl.report import OutputError, TensorError
from effdl.runtime.session import Session
from effdl.runtime.target import Target

_BETTER = 0.25
"""An alternative counterpart has to have at most this share of the error of the one by name."""
_ADD_BROADCASTS = 7
_TRIED = 96
"""Steps whose effect is tried at least; more where more than a third of that is wanted."""


@dataclass(frozen=True)
class Found:
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


class Search:
    """One search; ``say`` is told what is going on, the rest is as in ``locate``."""

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
        say: Say,
    ) -> None:
        self.reference = reference
        self.candidate = candidate
        self.feeds = feeds
        self.target = target
        self.rtol = rtol
        self.top = top
        self.optimize = optimize
        self.max_bytes = max_bytes
        self.say = say
        self.pairs, lost = counterparts(reference, candidate)
        self.unmatched = len(lost)
        self.found: dict[ir.Value, Found] = {}
        self.size: dict[str, int] = {}

    def find(
        self,
    ) -> tuple[TensorError | None, tuple[TensorError, ...], tuple[str, ...]]:
        """Return the first tensor beyond tolerance, the jumps and what was left out."""
        notes = self._measure()
        known = set(self.found)
        order = {value: k for k, value in enumerate(self.found)}
        moved = _rearranged(self.found, {v: nearest(v, known) for v in known})
        if moved:
            some = min(moved, key=order.__getitem__).name
            notes.append(
                f"left out, since all behind agrees: {_count(len(moved))}, such as '{some}'"
            )
        usable = {v for v, f in self.found.items() if f.comparable and v not in moved}
        shown = [v for v in self.found if v not in moved]
        before = {v: nearest(v, usable) for v in shown}
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

        Those whose own error is largest are tried on one feed, those that hurt most then on all.
        """
        steps = {
            v: self._step(v, before[v])
            for v in errors
            if v in usable and errors[v].error > 0 and self.found[v].dtype.kind == "f"
        }
        if not steps or opset(self.reference) < _ADD_BROADCASTS:
            return {}
        shortlist = list(steps)
        own = self._alone(list(steps.values()), self.feeds.first(1))
        if self.top is not None:
            most = max(_TRIED, 3 * self.top)
            largest = sorted(steps, key=lambda v: -own[v].error)[:most]
            screen = self._effects([steps[v] for v in largest], self.feeds.first(1), "trying")
            shortlist = sorted(largest, key=lambda v: -screen[v])[: self.top]
            shortlist += [v for v in steps if v is first and v not in shortlist]
        some = [steps[v] for v in shortlist]
        if len(self.feeds) > 1:
            own = self._alone(some, self.feeds)
        effect = self._effects(some, self.feeds, "measuring")
        return {
            v: replace(errors[v], effect=effect[v], alone=own[v].error, unrounded=own[v].unrounded)
            for v in sorted(effect, key=lambda v: -effect[v])
        }

    def _alone(self, steps: Sequence[Step], feeds: Feeds) -> dict[ir.Value, Alone]:
        self.say("alone", f"{len(steps)} steps")
        return alone(
            self.reference, self.candidate, steps, feeds, self.target, max_bytes=self.max_bytes
        )

    def _effects(self, steps: Sequence[Step], feeds: Feeds, what: str) -> dict[ir.Value, float]:
        return effects(
            self.reference,
            self.candidate,
            steps,
            feeds,
            self.target,
            max_bytes=self.max_bytes,
            say=lambda n, of: self.say("steps", f"{what} {n} of {of}"),
        )

    def _measure(self) -> list[str]:
        """Compare all pairs; returns notes on what was left out."""
        inside = {p.value.name or "": p for p in self.pairs if p.value.producer() is not None}
        fed = [p for p in self.pairs if p.value.producer() is None]
        everything = [*inside, *(a.name or "" for p in inside.values() for a in p.alternatives)]
        largest = max(self.feeds, key=nbytes)
        self.say("tensors", "sizing")
        self.size = sizes(self.reference, list(dict.fromkeys(everything)), largest, self.target)
        others = _names(p.other for p in inside.values())
        there = fetchable(self.candidate, others, self.target)
        size = {
            n: 2 * self.size[n] + sum(self.size.get(a.name or "", 0) for a in p.alternatives)
            for n, p in inside.items()
            if n in self.size and (reading(p.other).value.name or "") in there
        }
        odd = len(inside) - len(size)
        notes = [f"left out, since numpy has not their type: {_count(odd)}"] if odd else []
        if fed:
            self._compare(fed)
        done = 0
        for chunk in chunks(list(size), size, self.max_bytes):
            self.say("tensors", f"comparing {done + 1} to {done + len(chunk)} of {len(size)}")
            self._compare([inside[n] for n in chunk])
            done += len(chunk)
        for what, model in (("reference", self.reference), ("candidate", self.candidate)):
            hidden = _hidden(model)
            if hidden:
                notes.append(f"out of reach inside the {what}'s subgraphs: {_count(hidden)}")
        return notes

    def _compare(self, pairs: Sequence[Pair]) -> None:
        """Run both models on every feed with these pairs as outputs."""
        mine = {p: [p.value, *self._fitting(p.alternatives)] for p in pairs}
        left = self._open(self.reference, [v for values in mine.values() for v in values])
        right = self._open(self.candidate, [p.other for p in pairs])
        sums = Comparison(self.rtol, casts=True, classes=False)
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
            found = Found(value, pair.other, errors[key], key not in odd, dtypes[pair])
            self.found.setdefault(value, found)

    def _fitting(self, values: Iterable[ir.Value]) -> list[ir.Value]:
        return [v for v in values if (v.name or "") in self.size]

    def _open(self, model: ir.Model, values: Iterable[ir.Value]) -> Session:
        return tapped(model, _names(values), self.target, optimize=self.optimize)

    def _step(self, value: ir.Value, before: Sequence[ir.Value]) -> Step:
        found = [self.found[i] for i in before]
        nbytes = sum(self.size.get(v.name or "", 0) for v in [value, *(f.value for f in found)])
        sources = tuple(Source(f.value, f.other, f.dtype) for f in found)
        return Step(value, self.found[value].other, sources, nbytes)

    def _error(self, found: Found, before: Sequence[ir.Value]) -> TensorError:
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
            nodes=between(found.value, set(before)),
            readers=tuple(n.name or "" for n in dict.fromkeys(u.node for u in found.value.uses())),
            reason=error.reason,
        )


def _names(values: Iterable[ir.Value]) -> list[str]:
    """Names of what is fetched to read ``values``; graph inputs are known without."""
    fetched = (reading(v).value for v in values)
    return [v.name or "" for v in fetched if v.producer() is not None]


def _read(value: ir.Value, fetched: Mapping[str, Any]) -> Any:
    how = reading(value)
    return how.number(fetched[how.value.name or ""])


def _alike(a: Any, b: Any) -> bool:
    """Whether two tensors can be subtracted."""
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
        return False
    return a.shape == b.shape and (a.dtype == b.dtype or {a.dtype.kind, b.dtype.kind} == {"f"})


def _best(keys: Sequence[str], errors: Mapping[str, OutputError], odd: set[str]) -> int:
    """Return the place of the counterpart: the first, or an alternative that fits far better."""
    best, limit = 0, _BETTER * errors[keys[0]].rel_l2
    for j, key in enumerate(keys[1:], 1):
        if key in errors and key not in odd and errors[key].rel_l2 < limit:
            best, limit = j, errors[key].rel_l2
    return best


def _rearranged(
    found: Mapping[ir.Value, Found], before: Mapping[ir.Value, tuple[ir.Value, ...]]
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


def _count(number: int) -> str:
    return "1 tensor" if number == 1 else f"{number} tensors"


def _hidden(model: ir.Model) -> int:
    """Count the tensors inside the bodies of If, Loop and Scan."""
    return sum(len(n.outputs) for g in subgraphs_in(model.graph) for n in g)
