"""Remembers what was worked out about a model for as long as the model stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import onnx_ir as ir

from effdl.graph.walk import all_graphs

T = TypeVar("T")
_known: WeakKeyDictionary[ir.Model, tuple[_Stamp, dict[Hashable, object]]] = WeakKeyDictionary()


class _Stamp:
    """What a model looks like; equal stamps of one model mean that it was not edited in between.

    It holds the objects that it names by their addresses, so that no other takes their place.
    """

    def __init__(self, model: ir.Model) -> None:
        self.seen: list[object] = []
        self._held: list[object] = []
        self.seen += sorted(model.opset_imports.items())
        for function in model.functions.values():
            self.seen += (function.domain, function.name)
            self.seen += sorted(function.opset_imports.items())
            self._inside(function)
        for graph in all_graphs(model):
            self._inside(graph)

    def _inside(self, graph: ir.Graph | ir.Function) -> None:
        seen, held = self.seen, self._held
        held.append(graph)
        seen.append(id(graph))
        for value in graph.inputs:
            self._value(value)
        if isinstance(graph, ir.Graph):
            for value in graph.initializers.values():
                self._value(value)
                held.append(value.const_value)
                seen.append(id(value.const_value))
        seen += map(id, graph.outputs)
        for node in graph:
            held.append(node)
            seen += (id(node), node.op_type, node.domain)
            seen += map(id, node.inputs)
            for attr in node.attributes.data.values():
                held.append(attr)
                seen.append(id(attr))
            for value in node.outputs:
                self._value(value)

    def _value(self, value: ir.Value) -> None:
        self._held.append(value)
        dims = None if value.shape is None else value.shape.dims
        self.seen += (id(value), value.name, value.type, dims)


def remembered(model: ir.Model, key: Hashable, work_out: Callable[[], T]) -> T:
    """Return what ``work_out`` returned for ``key`` last time, if the model is still the same.

    Args:
        model: what the answer is about: graphs, nodes, attributes, values with types and shapes,
            constants, imported operator sets. Metadata does not count.
        key: tells questions apart.
        work_out: answers; must depend on nothing else, and its answer must not be changed.
    """
    answers = _answers(model)
    if key not in answers:
        answers[key] = work_out()
    return answers[key]  # type: ignore[return-value]


def remember(model: ir.Model, key: Hashable, answer: object) -> None:
    """Keep an answer for ``recall`` while the model stays as it is now."""
    _answers(model)[key] = answer


def recall(model: ir.Model, key: Hashable) -> Any:
    """Return the answer that was kept for ``key``, None when there is none or the model changed."""
    return _answers(model).get(key)


def _answers(model: ir.Model) -> dict[Hashable, object]:
    stamp = _Stamp(model)
    last = _known.get(model)
    if last is None or last[0].seen != stamp.seen:
        last = (stamp, {})
        _known[model] = last
    return last[1]
