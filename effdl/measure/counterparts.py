"""Which tensor of one model is which tensor of another: by name, then by what makes it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.walk import is_op, nodes_in, subgraphs_of
from effdl.graph.weights import constant, constant_tensor

Array = npt.NDArray[np.generic]
_DOMAINS = ("", "com.microsoft")
_DEPTH = 4
_ALTERNATIVES = 4
_CONTENT_LIMIT = 1 << 22
_SAME_CONTENT = 0.1


@dataclass(frozen=True)
class Reading:
    """A tensor as whoever reads it sees it.

    Args:
        value: what is fetched.
        scale, zero: how ``value``, if it is quantized, becomes a number: (value - zero) * scale.
    """

    value: ir.Value
    scale: float | None = None
    zero: int = 0

    def number(self, fetched: Array) -> Array:
        """Turn what was fetched into what is read."""
        if self.scale is None:
            return fetched
        shifted = fetched.astype(np.float32) - np.float32(self.zero)
        return np.asarray(shifted * np.float32(self.scale))


@dataclass(frozen=True)
class Pair:
    """A tensor of the reference and the one of the candidate that stands for it.

    Args:
        value: of the reference.
        other: of the candidate.
        alternatives: tensors right behind ``value`` that the candidate has not: if nodes were folded
            into the one before them, ``other`` is one of these under the old name.
    """

    value: ir.Value
    other: ir.Value
    alternatives: tuple[ir.Value, ...] = ()


def counterparts(
    reference: ir.Model, candidate: ir.Model
) -> tuple[tuple[Pair, ...], tuple[ir.Value, ...]]:
    """Pair the tensors of two main graphs, in the order of the reference.

    A tensor belongs to the one of the same name. Where there is none, to the output of the one node
    that has the same op type and attributes and reads counterparts, seen through Identity, Cast,
    QuantizeLinear and DequantizeLinear, and constants of the same shape; if several would do, the one
    whose constants are alike. Tensors that only round another one are read, not paired, see ``reading``.

    Returns:
        The pairs, and the tensors of the reference without counterpart.
    """
    there = {o.name: o for n in candidate.graph for o in n.outputs if o.name}
    wanted = list(tensors(reference))
    found = {v: there[v.name] for v in wanted if v.name in there}
    _by_structure(reference, candidate, wanted, found)
    lost = [v for v in wanted if v not in found]
    free = set(lost)
    pairs = [*_inputs(reference, candidate)]
    pairs += [Pair(v, found[v], _behind(v, free)) for v in wanted if v in found]
    return tuple(pairs), tuple(lost)


def tensors(model: ir.Model) -> Iterator[ir.Value]:
    """Yield what the nodes of the main graph make, without constants and without rounded twins."""
    for node in model.graph:
        if is_op(node, "Constant") or (rounds(node) and not _gives_output(node)):
            continue
        yield from (o for o in node.outputs if o.name and (o.uses() or o.is_graph_output()))


def rounds(node: ir.Node | None, *op_types: str) -> bool:
    """Whether ``node`` is a QuantizeLinear or DequantizeLinear (or the one named)."""
    names = op_types or ("QuantizeLinear", "DequantizeLinear")
    return node is not None and node.op_type in names and node.domain in ("ai.onnx", *_DOMAINS)


def passes_on(node: ir.Node | None) -> bool:
    """Whether ``node`` gives its input on, at most rounded."""
    return rounds(node) or is_op(node, "Identity", "Cast")


def reading(value: ir.Value) -> Reading:
    """Return how the nodes behind ``value`` read it: through its QuantizeLinear if there is one."""
    if value.is_graph_output():
        return Reading(value)
    for user, index in value.uses():
        if index == 0 and rounds(user, "QuantizeLinear"):
            grid = _grid(user)
            if grid is not None:
                return Reading(user.outputs[0], *grid)
            for reader, _ in user.outputs[0].uses():
                if rounds(reader, "DequantizeLinear"):
                    return Reading(reader.outputs[0])
    return Reading(value)


def unrounded(value: ir.Value) -> ir.Value:
    """Return what ``value`` was before it was quantized and restored; itself if it was not."""
    node = value.producer()
    if node is None or not rounds(node, "DequantizeLinear") or node.inputs[0] is None:
        return value
    before = node.inputs[0].producer()
    while is_op(before, "Identity") and before is not None and before.inputs[0] is not None:
        before = before.inputs[0].producer()
    if before is None or not rounds(before, "QuantizeLinear") or before.inputs[0] is None:
        return value
    return unrounded(before.inputs[0])


def maker(value: ir.Value) -> ir.Node | None:
    """Return the node that computes ``value``, seen through Identity, Cast and rounding."""
    node = value.producer()
    while node is not None and passes_on(node) and node.inputs[0] is not None:
        before = node.inputs[0].producer()
        if before is None:
            break
        node = before
    return node


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """Yield what a node reads: its inputs, and what its subgraphs take from the graph around them."""
    yield from (v for v in node.inputs if v is not None)
    for graph in subgraphs_of(node):
        inside = {*graph.inputs, *graph.initializers.values()}
        for inner in nodes_in(graph):
            inside.update(inner.outputs)
        for inner in nodes_in(graph):
            yield from (v for v in inner.inputs if v is not None and v not in inside)


def nearest(value: ir.Value, known: set[ir.Value]) -> tuple[ir.Value, ...]:
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


def between(value: ir.Value, known: set[ir.Value]) -> tuple[str, ...]:
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


def _inputs(reference: ir.Model, candidate: ir.Model) -> Iterator[Pair]:
    """Pair the graph inputs that one of the models rounds before it reads them."""
    there = {v.name: v for v in candidate.graph.inputs}
    for value in reference.graph.inputs:
        other = there.get(value.name)
        if other is None or value.is_initializer():
            continue
        if reading(value).value is not value or reading(other).value is not other:
            yield Pair(value, other)


def _gives_output(node: ir.Node) -> bool:
    return any(o.is_graph_output() for o in node.outputs)


def _grid(node: ir.Node) -> tuple[float, int] | None:
    """Return scale and zero point of a QuantizeLinear if they are one constant number each."""
    scale = constant(node.inputs[1])
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    if scale is None or scale.size != 1 or scale.dtype != np.float32:
        return None
    if (
        zero is None
        or zero.size != 1
        or zero.dtype.name not in ("uint8", "int8", "uint16", "int16")
    ):
        return None
    return float(scale.reshape(())), int(zero.reshape(()))


def _behind(value: ir.Value, free: set[ir.Value]) -> tuple[ir.Value, ...]:
    """Return tensors without counterpart that follow from ``value``, nearest first."""
    found: list[ir.Value] = []
    level = [value]
    for _ in range(_DEPTH):
        after = [o for v in level for user, _ in v.uses() for o in user.outputs if o in free]
        level = [v for v in dict.fromkeys(after) if v not in found]
        found += level
    return tuple(found[:_ALTERNATIVES])


def _by_structure(
    reference: ir.Model,
    candidate: ir.Model,
    wanted: list[ir.Value],
    found: dict[ir.Value, ir.Value],
) -> None:
    """Add to ``found`` the counterparts of tensors whose names are gone."""
    free = {v for v in wanted if v not in found}
    if not free:
        return
    back = {other: _source(v) for v, other in found.items()}
    inputs = {v.name: v for v in reference.graph.inputs}
    waiting: dict[Hashable, list[ir.Node]] = {}
    for node in reference.graph:
        if any(o in free for o in node.outputs):
            key = _key(node, [_own_token(v) for v in node.inputs])
            if key is not None:
                waiting.setdefault(key, []).append(node)
    for node in candidate.graph:
        if passes_on(node) or any(o in back for o in node.outputs):
            continue
        key = _key(node, [_token(v, back, inputs) for v in node.inputs])
        twin = _choose(node, waiting.get(key, [])) if key is not None else None
        if twin is None:
            continue
        waiting[key].remove(twin)
        for mine, other in zip(twin.outputs, node.outputs, strict=False):
            back[other] = _source(mine)
            if mine in free:
                found[mine] = other


def _source(value: ir.Value) -> ir.Value:
    """Follow ``value`` back through nodes that give it on."""
    node = value.producer()
    while passes_on(node) and node is not None and node.inputs[0] is not None:
        if constant_tensor(node.inputs[0]) is not None:
            break
        value = node.inputs[0]
        node = value.producer()
    return value


def _own_token(value: ir.Value | None) -> Hashable:
    if value is None:
        return "absent"
    return _constant_token(value) or _source(value)


def _token(
    value: ir.Value | None, back: Mapping[ir.Value, ir.Value], inputs: Mapping[str | None, ir.Value]
) -> Hashable | None:
    """Say what an input of a candidate's node is in the reference, None when that is not known."""
    while value is not None:
        known = _constant_token(value) or back.get(value)
        if known is not None:
            return known
        node = value.producer()
        if node is None:
            return inputs.get(value.name) if value.is_graph_input() else None
        if not passes_on(node):
            return None
        value = node.inputs[0]
    return "absent"


def _constant_token(value: ir.Value) -> Hashable | None:
    tensor = constant_tensor(_weight(value))
    return None if tensor is None else ("constant", tuple(tensor.shape.numpy()))


def _weight(value: ir.Value) -> ir.Value:
    """Return the constant that ``value`` is a Cast or DequantizeLinear of; else ``value``."""
    node = value.producer()
    if passes_on(node) and node is not None and node.inputs[0] is not None:
        source = _weight(node.inputs[0])
        return source if constant_tensor(source) is not None else value
    return value


def _key(node: ir.Node, tokens: list[Hashable | None]) -> Hashable | None:
    if None in tokens or subgraphs_of(node):
        return None
    domain = "" if node.domain == "ai.onnx" else node.domain
    attributes = sorted(
        (name, "" if a.type == ir.AttributeType.TENSOR else str(a.value))
        for name, a in node.attributes.items()
    )
    return (domain, node.op_type, tuple(attributes), tuple(tokens), len(node.outputs))


def _choose(node: ir.Node, twins: list[ir.Node]) -> ir.Node | None:
    """Return the one of ``twins`` that ``node`` stands for, None when that cannot be told."""
    if len(twins) < 2:
        return twins[0] if twins else None
    named = [t for t in twins if t.name and t.name == node.name]
    alike = named or [t for t in twins if _same_constants(node, t)]
    return alike[0] if len(alike) == 1 else None


def _same_constants(node: ir.Node, twin: ir.Node) -> bool:
    seen = False
    for mine, other in zip(node.inputs, twin.inputs, strict=True):
        if mine is None or other is None:
            continue
        a, b = _numbers(mine), _numbers(other)
        if a is None or b is None:
            continue
        seen = True
        if float(np.linalg.norm(a - b)) > _SAME_CONTENT * float(np.linalg.norm(b)):
            return False
    return seen


def _numbers(value: ir.Value) -> npt.NDArray[np.float64] | None:
    """Return a constant that is not too large as numbers, dequantized if it is quantized."""
    tensor = constant_tensor(_weight(value))
    if tensor is None or tensor.size > _CONTENT_LIMIT or tensor.dtype == ir.DataType.STRING:
        return None
    array = tensor.numpy().astype(np.float64)
    node = value.producer()
    if not rounds(node, "DequantizeLinear") or node is None:
        return array
    scale = constant(node.inputs[1])
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if scale is None or scale.ndim > 1:
        return None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    shape = [1] * array.ndim
    if scale.size > 1:
        shape[axis] = scale.size
    offset = 0.0 if zero is None else zero.astype(np.float64).reshape(shape)
    return np.asarray((array - offset) * scale.astype(np.float64).reshape(shape))
