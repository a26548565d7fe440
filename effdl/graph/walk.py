"""Traversal: every node and every graph of a model, subgraphs and functions included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

DEFAULT_DOMAIN = ""
MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""
_WITH_GRAPHS = frozenset(("If", "Loop", "Scan", "SequenceMap"))


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the nodes of the main graph, of all subgraphs and of all functions."""
    yield from nodes_in(model.graph)
    yield from function_nodes(model)


def function_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the nodes of all functions."""
    for function in model.functions.values():
        yield from nodes_in(function)


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Yield the main graph, then every subgraph of it and of the functions."""
    yield model.graph
    yield from subgraphs_in(model.graph)
    for function in model.functions.values():
        yield from subgraphs_in(function)


def nodes_in(graph: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    """Yield the nodes of a graph, each followed by those of its subgraphs.

    Several times as fast as ``Graph.all_nodes``, which asks every attribute of every node.
    """
    for node in graph:
        yield node
        for inner in subgraphs_of(node):
            yield from nodes_in(inner)


def subgraphs_in(graph: ir.Graph | ir.Function) -> list[ir.Graph]:
    """Return every graph inside ``graph``, an outer one before those in it."""
    found: list[ir.Graph] = []
    for node in graph:
        for inner in subgraphs_of(node):
            found += [inner, *subgraphs_in(inner)]
    return found


def subgraphs_of(node: ir.Node) -> Sequence[ir.Graph]:
    """Return the graphs that are attributes of ``node`` (the bodies of If, Loop and Scan)."""
    if node.op_type not in _WITH_GRAPHS and node.domain == DEFAULT_DOMAIN:
        return ()
    found: list[ir.Graph] | None = None
    for attr in node.attributes.data.values():
        if attr.type is ir.AttributeType.GRAPH:
            found = [*(found or ()), attr.as_graph()]
        elif attr.type is ir.AttributeType.GRAPHS:
            found = [*(found or ()), *attr.as_graphs()]
    return found or ()


def interface(model: ir.Model) -> set[str]:
    """Return ``input x: FLOAT[batch,3]`` for each input that must be fed, and the same of outputs.

    An input that has an initializer is a default that few callers feed; it does not count.
    """
    inputs = [v for v in model.graph.inputs if not v.is_initializer()]
    return {f"input {k} {_typed(v)}" for k, v in enumerate(inputs)} | {
        f"output {k} {_typed(v)}" for k, v in enumerate(model.graph.outputs)
    }


def _typed(value: ir.Value) -> str:
    return f"{value.name}: {value.type}{value.shape if value.shape is not None else ''}"


def opset(model: ir.Model, domain: str = DEFAULT_DOMAIN) -> int:
    """Return the version of ``domain`` that the model imports, 0 when it does not."""
    imports = model.opset_imports
    if domain in ("", "ai.onnx"):
        return imports.get("", imports.get("ai.onnx", 0))
    return imports.get(domain, 0)


def is_op(node: ir.Node | None, *op_types: str, domain: str = DEFAULT_DOMAIN) -> bool:
    """Whether ``node`` is one of ``op_types`` of ``domain`` (the default domain in both spellings)."""
    if node is None or node.op_type not in op_types:
        return False
    same = ("", "ai.onnx") if domain == DEFAULT_DOMAIN else (domain,)
    return node.domain in same


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the node that makes ``value`` when it is one of ``op_types`` (any, when none named)."""
    node = value.producer() if value is not None else None
    if node is None or not op_types or is_op(node, *op_types):
        return node
    return None


def only_user(value: ir.Value | None) -> ir.Node | None:
    """Return the one node that uses ``value`` (once), None when it has other users or is an output."""
    if value is None or value.is_graph_output():
        return None
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 else None


def int_attr(node: ir.Node, name: str, default: int) -> int:
    """Return the integer attribute ``name`` of ``node``, ``default`` when it is absent."""
    attr = node.attributes.get(name)
    return default if attr is None else attr.as_int()


def ints_attr(node: ir.Node, name: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Return the integer-list attribute ``name`` of ``node``, ``default`` when it is absent."""
    attr = node.attributes.get(name)
    return default if attr is None else tuple(attr.as_ints())


def float_attr(node: ir.Node, name: str, default: float) -> float:
    """Return the float attribute ``name`` of ``node``, ``default`` when it is absent."""
    attr = node.attributes.get(name)
    return default if attr is None else attr.as_float()


def str_attr(node: ir.Node, name: str, default: str) -> str:
    """Return the string attribute ``name`` of ``node``, ``default`` when it is absent."""
    attr = node.attributes.get(name)
    return default if attr is None else attr.as_string()
