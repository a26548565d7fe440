"""Lets the layers of a pruned model make up for what is gone, one after the other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.data.feeds import Feeds
from effdl.graph.cost import model_cost
from effdl.graph.weights import Names
from effdl.measure.taps import chunks
from effdl.observe.moments import moment_bytes
from effdl.observe.pairs import Pair, pairs
from effdl.passes._layer_form import LayerForm, layer_form
from effdl.solve.refit import refit

Mask = npt.NDArray[np.bool_]
Kept = dict[tuple[str, int], Mask]
"""What is left of the axes of the values of the old model, by name and axis, counted from either end."""
_MACS = 1e13
"""Multiply-accumulates that all the runs together may take: some minutes of two cores."""
_LEAST_SWEEPS = 4


@dataclass(frozen=True)
class Fitted:
    """What became of one layer: relative error of its output on held-out rows."""

    node: ir.Node
    before: float
    after: float


def fit(
    old: ir.Model,
    new: ir.Model,
    kept: Kept,
    feeds: Feeds,
    *,
    threads: int,
    max_bytes: int,
    changed: Collection[str] = (),
    wanted: Mapping[str, str] | None = None,
) -> list[Fitted]:
    """Fit every layer behind the first change to what it put out in the old model.

    Layers are taken in order, so that each sees what the fitted layers before it give. Models that take long
    to run are fitted a few layers at a time.

    Args:
        old: the model before pruning.
        new: the pruned one; its weights and biases are changed.
        kept: see ``Kept``.
        feeds: calibration samples.
        threads: intra-op threads, 0 for ONNX Runtime's choice.
        max_bytes: that the moments of the layers of one sweep may take.
        changed: values of the new model that hold something else than in the old one.
        wanted: values of the old model that others of the new one should be like, by the names of those;
            values that are not named should stay what they are. The layers that make them are fitted too.
    """
    names, done, targets = Names(new), list[Fitted](), dict(wanted or {})
    behind = set(_behind(new, {*(name for name, _ in kept), *changed}))
    known = {o.name for n in old.graph for o in n.outputs}
    forms = [f for f in _forms(new) if f.node in behind or _target(f) in targets]
    forms = [f for f in forms if targets.get(_target(f), _target(f)) in known]
    for group in _sweeps(forms, old, len(feeds), max_bytes):
        layers = {form.node: _pair(form, kept, targets) for form in group}
        by_node = {form.node: form for form in group}
        for node, seen, held in pairs(old, new, layers, feeds, threads=threads):
            form = by_node[node]
            found = refit(form.weight(), seen, held)
            form.write(found.weight, found.bias, names)
            done.append(Fitted(node, found.before, found.after))
    return done


def learnable(model: ir.Model) -> set[str]:
    """Return the values that layers make which can be fitted to others."""
    return {_target(form) for form in _forms(model)}


def _forms(model: ir.Model) -> Iterator[LayerForm]:
    for node in model.graph:
        form = layer_form(node)
        if form is not None and form.takes_bias:
            yield form


def _behind(model: ir.Model, changed: set[str]) -> Iterator[ir.Node]:
    """Yield the nodes that see something that changed."""
    for node in model.graph:
        if any(v is not None and v.name in changed for v in node.inputs):
            changed.update(o.name or "" for o in node.outputs)
            yield node


def _target(form: LayerForm) -> str:
    return (form.total if form.total is not None else form.result).name or ""


def _pair(form: LayerForm, kept: Kept, wanted: Mapping[str, str]) -> Pair:
    target = _target(form)
    return Pair(
        form.rows,
        wanted.get(target, target),
        form.axis,
        kept.get((target, form.axis)),
        (form.beside.name or "") if form.beside is not None else "",
    )


def _sweeps(
    forms: Sequence[LayerForm], old: ir.Model, feeds: int, max_bytes: int
) -> Iterator[list[LayerForm]]:
    """Cut the layers into as many groups as there is time to run the models for."""
    macs = max(1, model_cost(old).macs or 1) * 2 * feeds
    sweeps = min(len(forms), max(_LEAST_SWEEPS, round(_MACS / macs)))
    most = -(-len(forms) // max(1, sweeps))
    sizes = {form: 4 * moment_bytes(form.rows) for form in forms}
    return chunks(forms, sizes, max_bytes, most)
