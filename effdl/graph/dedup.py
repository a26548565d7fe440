"""Duplicates: nodes that compute the same, weights that hold the same bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from effdl.graph.edit import can_forward, forward, remove_if_unused, renamed, roots
from effdl.graph.walk import is_op, subgraphs_of
from effdl.graph.weights import Names, constant

Report = Callable[[ir.Node | str, str], None]

RANDOM_OPS = frozenset(
    {
        "Bernoulli",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)
_PURE_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")
_SAMPLE = 64


def deterministic(node: ir.Node, opset: int) -> bool:
    """Whether ``node`` is known to give the same outputs each time it gets the same inputs.

    Operators of foreign domains and calls of functions are not known.
    """
    if node.domain not in _PURE_DOMAINS or node.op_type in RANDOM_OPS:
        return False
    return not is_op(node, "Dropout") or dropout_is_identity(node, opset)


def dropout_is_identity(node: ir.Node, opset: int) -> bool:
    """Whether this Dropout passes its input through: inference mode in every version's own spelling."""
    if opset >= 12:
        if len(node.inputs) < 3 or node.inputs[2] is None:
            return True
        mode = constant(node.inputs[2])
        return mode is not None and not mode.any()
    if opset >= 7:
        return True
    flag = node.attributes.get("is_test")
    return flag is not None and not flag.is_ref() and flag.as_int() != 0


def merge_nodes(model: ir.Model, touch: Report, skip: Report) -> int:
    """Let one node stand for all that compute the same; return how many were removed.

    A node inside a subgraph may be replaced by an equal one of a graph around it. Nodes with
    subgraphs, random ones and those of foreign domains are left alone.
    """
    changes = 0
    for graph, imports, _ in roots(model):
        opset = imports.get("", imports.get("ai.onnx", 0))
        changes += _Merger(opset, touch, skip).run(graph, {})
    return changes


@dataclass
class _Merger:
    opset: int
    touch: Report
    skip: Report

    def run(self, graph: ir.Graph, outer: dict[object, ir.Node]) -> int:
        seen = dict(outer)
        changes = 0
        for node in list(graph):
            for inner in subgraphs_of(node):
                changes += self.run(inner, seen)
            key = self._key(node)
            if key is None:
                continue
            first = seen.setdefault(key, node)
            if first is not node:
                changes += self._merge(node, first, key, seen)
        return changes

    def _merge(
        self, node: ir.Node, first: ir.Node, key: object, seen: dict[object, ir.Node]
    ) -> int:
        pairs = list(zip(node.outputs, first.outputs, strict=True))
        if not all(can_forward(old, new) for old, new in pairs):
            if first.graph is not node.graph:
                seen[key] = node
            self.skip(node, f"the same as '{first.name}', but both are outputs of the graph")
            return 0
        self.touch(node, f"duplicate of {first.name or first.op_type}")
        for old, new in pairs:
            forward(old, new)
        remove_if_unused(node)
        return 1

    def _key(self, node: ir.Node) -> object | None:
        if is_op(node, "Constant") or not deterministic(node, self.opset):
            return None
        if subgraphs_of(node):
            return None
        attributes = tuple(
            (name, node.attributes[name].ref_attr_name or _attribute_key(node.attributes[name]))
            for name in sorted(node.attributes)
        )
        inputs = tuple(None if v is None else id(v) for v in node.inputs)
        return (node.domain, node.op_type, attributes, inputs, len(node.outputs))


def _attribute_key(attribute: ir.Attr) -> object:
    if attribute.type in (ir.AttributeType.INT, ir.AttributeType.INTS, ir.AttributeType.STRING):
        return attribute.value
    return _attribute_proto(attribute).SerializeToString(deterministic=True)


def _attribute_proto(attribute: ir.Attr) -> onnx.AttributeProto:
    # ir.to_proto asks first what it was given, which takes longer than the rest.
    return ir.serde.serialize_attribute(attribute)


def merge_initializers(model: ir.Model, touch: Report) -> int:
    """Let one initializer stand for all that hold the same bytes; return how many were removed.

    The one that stays is moved to the innermost graph that all users can see. Initializers that are
    also inputs (a caller may override them) or outputs are left alone.
    """
    changes = 0
    for root, _, is_function in roots(model):
        paths = _paths(root)
        for group in _equal_groups(paths):
            changes += _merge_group(model, group, paths, root if is_function else None, touch)
    return changes


def _paths(root: ir.Graph) -> dict[ir.Graph, tuple[ir.Graph, ...]]:
    """Every graph of ``root`` with the graphs around it, outermost first, itself last."""
    paths: dict[ir.Graph, tuple[ir.Graph, ...]] = {root: (root,)}
    todo = [root]
    while todo:
        graph = todo.pop(0)
        for node in graph:
            for inner in subgraphs_of(node):
                paths[inner] = (*paths[graph], inner)
                todo.append(inner)
    return paths


def _equal_groups(paths: dict[ir.Graph, tuple[ir.Graph, ...]]) -> list[list[ir.Value]]:
    alike: dict[object, list[ir.Value]] = defaultdict(list)
    for graph in paths:
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or value.is_graph_input() or value.is_graph_output():
                continue
            alike[(tensor.dtype, tensor.shape.numpy())].append(value)
    groups = []
    for values in alike.values():
        if len(values) > 1:
            groups += _split_by_content(values)
    return groups


def _split_by_content(values: list[ir.Value]) -> list[list[ir.Value]]:
    """Group values of one dtype and shape by their bytes, reading few of them where they differ."""
    buckets: dict[bytes, list[tuple[npt.NDArray[np.uint8], list[ir.Value]]]] = defaultdict(list)
    for value in values:
        data = _content(value)
        bucket = buckets[_sample(data)]
        for known, members in bucket:
            if known is data or np.array_equal(known, data):
                members.append(value)
                break
        else:
            bucket.append((data, [value]))
    return [m for bucket in buckets.values() for _, m in bucket if len(m) > 1]


def _content(value: ir.Value) -> npt.NDArray[np.uint8]:
    tensor = value.const_value
    assert tensor is not None
    if tensor.dtype == ir.DataType.STRING:
        words = [w if isinstance(w, bytes) else str(w).encode() for w in tensor.numpy().ravel()]
        return np.frombuffer(repr(words).encode(), np.uint8)
    array = np.ascontiguousarray(tensor.numpy())
    return array.reshape(-1).view(np.uint8)


def _sample(data: npt.NDArray[np.uint8]) -> bytes:
    step = max(1, len(data) // _SAMPLE)
    return data[::step].tobytes() + data[-_SAMPLE:].tobytes()


def _merge_group(
    model: ir.Model,
    group: list[ir.Value],
    paths: dict[ir.Graph, tuple[ir.Graph, ...]],
    function: ir.Graph | None,
    touch: Report,
) -> int:
    home = _common(group, paths)
    if home is function:
        # The body of a function holds no initializers: what can be merged are equals of one graph.
        return sum(
            _merge_group(model, same, paths, None, touch)
            for same in _by_graph(group)
            if len(same) > 1
        )
    keep = next((v for v in group if v.graph is home), None)
    if keep is None:
        keep = _lift(model, group[0], home)
    for value in group:
        if value is keep:
            continue
        for user, index in value.uses():
            user.replace_input_with(index, keep)
        owner = value.graph
        if owner is not None:
            del owner.initializers[value.name or ""]
        touch(value.name or "", f"same bytes as {keep.name}")
    return len(group) - 1


def _by_graph(group: list[ir.Value]) -> list[list[ir.Value]]:
    graphs: dict[ir.Graph | None, list[ir.Value]] = defaultdict(list)
    for value in group:
        graphs[value.graph].append(value)
    return list(graphs.values())


def _common(group: list[ir.Value], paths: dict[ir.Graph, tuple[ir.Graph, ...]]) -> ir.Graph:
    chains = [paths[v.graph] for v in group if v.graph is not None]
    common = [level for level in zip(*chains, strict=False) if len(set(level)) == 1]
    graph: ir.Graph = common[-1][0]
    return graph


def _lift(model: ir.Model, value: ir.Value, home: ir.Graph) -> ir.Value:
    """Make a copy of ``value`` that lives in ``home``, sharing the bytes."""
    assert value.const_value is not None
    name = Names(model).fresh(value.name or "weight")
    tensor = renamed(value.const_value, name)
    copy = ir.Value(name=name, shape=value.shape, type=value.type, const_value=tensor)
    home.register_initializer(copy)
    return copy
