"""Edits that the writers of integer weights share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from effdl.graph.weights import Names


def graph_of(node: ir.Node) -> ir.Graph:
    """Return the graph that a node stands in."""
    if not isinstance(node.graph, ir.Graph):
        raise ValueError(f"{node.name}: not in a graph")
    return node.graph


def home_of(value: ir.Value, node: ir.Node) -> ir.Graph:
    """Return the graph that holds the weight ``value``: inner graphs that share it see its integers too."""
    return value.graph if isinstance(value.graph, ir.Graph) else graph_of(node)


def new_node(
    names: Names,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    base: str,
    attributes: Mapping[str, int] | None = None,
) -> ir.Node:
    """Return a node of ONNX's own domain with names made from ``base``."""
    name = names.fresh(f"{base}_{op_type}")
    node = ir.node(op_type, inputs, dict(attributes or {}), name=name)
    node.outputs[0].name = names.fresh(f"{base}_{op_type}_Output")
    return node


def put_in_place(node: ir.Node, made: Sequence[ir.Node]) -> None:
    """Put ``made`` in place of ``node``; the last one's outputs take over names, types and users."""
    graph = graph_of(node)
    graph.insert_before(node, made)
    pairs = list(zip(node.outputs, made[-1].outputs, strict=True))
    names = [old.name for old in node.outputs]
    for old, new in pairs:
        new.type, new.shape = old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    for (_, new), name in zip(pairs, names, strict=True):
        new.name = name
