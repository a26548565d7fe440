"""The graph of a model file as its author wrote it, made so that every node can be told by its name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from effdl.graph.io import data_files

Scope = tuple[str, ...]
"""Where a node lies: the names of the nodes that hold its graph, each with the attribute's name."""
_READABLE = re.compile(r'[^"\\\x00-\x1f]+')


@dataclass(eq=False)
class Node:
    """A node of a graph, with what its subgraphs take from outside among the inputs.

    Args:
        label: what a person calls it: its name, or that of its first output when it has none.
        arity: its inputs counted with those left out, subgraphs apart.
        bodies: outputs of each of its subgraphs, by the scope of what lies in it.
    """

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    scope: Scope
    label: str = ""
    arity: int = 0
    bodies: dict[Scope, tuple[str, ...]] = field(default_factory=dict)


@dataclass
class Graph:
    """All nodes of a model, those in subgraphs after the node that holds them.

    Args:
        constants: names of initializers; ``results`` of graph outputs.
    """

    nodes: list[Node] = field(default_factory=list)
    constants: set[str] = field(default_factory=set)
    results: set[str] = field(default_factory=set)


def read_graph(proto: onnx.ModelProto, labels: dict[str, str] | None = None) -> Graph:
    """Return the nodes of a message in the order they are run.

    Args:
        proto: the model; its functions are left out.
        labels: by node name, what to call it.
    """
    graph = Graph(results={o.name for o in proto.graph.output})
    _read(proto.graph, (), graph, labels or {})
    return graph


def _read(proto: onnx.GraphProto, scope: Scope, graph: Graph, labels: dict[str, str]) -> set[str]:
    """Add the nodes of ``proto``; returns the names that it takes from outside."""
    own = {i.name for i in proto.input} | {i.name for i in proto.initializer}
    graph.constants.update(i.name for i in proto.initializer)
    graph.constants.update(i.values.name for i in proto.sparse_initializer)
    taken: set[str] = set()
    for node in proto.node:
        entry = Node(node.name, node.op_type, (), tuple(node.output), scope)
        first = next((o for o in node.output if o), "")
        entry.label = labels.get(node.name) or node.name or first
        entry.arity = len(node.input)
        graph.nodes.append(entry)
        inputs = [i for i in node.input if i]
        for attr in node.attribute:
            for body in [attr.g] if attr.HasField("g") else attr.graphs:
                place = (*scope, f"{node.name}/{attr.name}")
                entry.bodies[place] = tuple(o.name for o in body.output)
                inputs += sorted(_read(body, place, graph, labels))
        entry.inputs = tuple(dict.fromkeys(inputs))
        taken.update(i for i in inputs if i not in own)
        own.update(node.output)
    taken.update(o.name for o in proto.output if o.name not in own)
    return taken


def named_copy(path: Path, folder: Path) -> tuple[Path, Graph]:
    """Return a file of the same model in which every node has a name of its own, and its graph.

    ONNX Runtime makes the names of fused nodes from those of their parts. When the names in ``path``
    are good, it is returned itself; otherwise a copy is written into ``folder``. External weights
    are linked there; where that cannot be done, the file is taken as it is.

    Args:
        path: the model.
        folder: an empty folder.
    """
    proto = onnx.load(path, load_external_data=False)
    nodes = list(_nodes(proto.graph))
    taken = {o for n in nodes for o in n.output} | {n.name for n in nodes}
    seen: set[str] = set()
    labels: dict[str, str] = {}
    for number, node in enumerate(nodes):
        good = _READABLE.fullmatch(node.name) and node.name not in seen
        if not good:
            label = node.name or next((o for o in node.output if o), "")
            name = f"{node.op_type}_{number}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)
            labels[name] = label
        seen.add(node.name)
    if not labels:
        return path, read_graph(proto)
    with suppress(OSError):
        for data in data_files(path):
            place = folder / data.relative_to(path.parent)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(data.resolve(), place)
        copy = folder / path.name
        copy.write_bytes(proto.SerializeToString())
        return copy, read_graph(proto, labels)
    return path, read_graph(onnx.load(path, load_external_data=False))


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attr in node.attribute:
            for body in [attr.g] if attr.HasField("g") else attr.graphs:
                yield from _nodes(body)
