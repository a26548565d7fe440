"""Small edits that keep a graph whole: rerouting values, removing nodes, renaming without side effects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
import onnx_ir as ir

from effdl.graph.walk import all_graphs, nodes_in, subgraphs_of


def renamed(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """Return the same data as a new tensor called ``name``; the old one may belong to a snapshot."""
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=name,
            base_dir=tensor.base_dir,
        )
    shape = ir.Shape(tensor.shape.numpy())
    if isinstance(tensor, ir.TensorProtoTensor) and not tensor.raw.HasField("raw_data"):
        # Small integers as varints take a byte each, eight as raw data.
        proto = onnx.TensorProto()
        proto.CopyFrom(tensor.raw)
        proto.name = name
        return ir.TensorProtoTensor(proto)
    if tensor.dtype == ir.DataType.STRING:
        # object arrays keep strings that end in zero bytes, which numpy's own string types cut off
        words = np.array(list(_strings(tensor)), dtype=object).reshape(shape.numpy())
        return ir.StringTensor(words, shape=shape, name=name)
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=shape, name=name)


def _strings(tensor: ir.TensorProtocol) -> Iterable[bytes]:
    if isinstance(tensor, ir.StringTensor):
        return tensor.string_data()
    return [w if isinstance(w, bytes) else str(w).encode() for w in tensor.numpy().ravel()]


def rename_value(value: ir.Value, name: str) -> None:
    """Rename ``value``; a constant gets a tensor of its own first, since clones share tensors."""
    if value.const_value is not None:
        value.const_value = renamed(value.const_value, name)
    value.name = name


def can_forward(old: ir.Value, new: ir.Value) -> bool:
    """Whether ``forward`` can let ``new`` stand for ``old``."""
    if not old.is_graph_output():
        return True
    node = old.producer()
    return (
        node is not None
        and new.producer() is not None
        and not new.is_graph_output()
        and new.graph is node.graph
        and (old.type is None or new.type is None or old.type == new.type)
    )


def forward(old: ir.Value, new: ir.Value) -> bool:
    """Let everything that reads ``old`` read ``new`` instead; False (nothing done) if it cannot be.

    It cannot be when ``old`` is a graph output and ``new`` is no free node output of the same graph:
    the output's name, type and declared shape must stay, so ``new`` takes them over.
    """
    if not can_forward(old, new):
        return False
    if old.is_graph_output():
        _take_over_output(old, new)
    for user, index in old.uses():
        user.replace_input_with(index, new)
    return True


def _take_over_output(old: ir.Value, new: ir.Value) -> None:
    graph = old.graph
    assert graph is not None
    old.name, new.name = new.name, old.name
    if old.type is not None:  # an output that declares no shape stays so
        new.type, new.shape = old.type, old.shape
    new.doc_string = old.doc_string
    for i, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[i] = new


def unused(node: ir.Node) -> bool:
    """Whether nothing reads any output of ``node``."""
    return not any(o.is_graph_output() or o.uses() for o in node.outputs)


def remove(node: ir.Node) -> None:
    """Take an unused node out of its graph, and what it and its subgraphs read with it."""
    graph = node.graph
    assert graph is not None
    for inner in subgraphs_of(node):
        release(inner)
    graph.remove(node, safe=True)


def release(graph: ir.Graph) -> None:
    """Let the nodes of a subgraph that is thrown away read nothing, so that outer values lose them."""
    for node in nodes_in(graph):
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)


def remove_if_unused(node: ir.Node) -> bool:
    """Remove ``node`` when nothing reads it; whether it was removed."""
    if node.graph is None or not unused(node):
        return False
    remove(node)
    return True


def roots(model: ir.Model) -> Iterator[tuple[ir.Graph, dict[str, int], bool]]:
    """Yield the main graph and every function body: graph, opset imports, is it a function."""
    yield model.graph, model.opset_imports, False
    for function in model.functions.values():
        yield function.graph, function.opset_imports, True


def has_reference(node: ir.Node) -> bool:
    """Whether an attribute of ``node`` is a parameter of the function it stands in."""
    return any(a.is_ref() for a in node.attributes.values())


def raise_ir_version(model: ir.Model) -> bool:
    """Make the format's version one that allows the model's initializers; whether it changed.

    Before version 4 every initializer had to be a graph input as well.
    """
    own = (v for g in all_graphs(model) for v in g.initializers.values())
    if model.ir_version >= 4 or all(v.is_graph_input() for v in own):
        return False
    model.ir_version = 4
    return True
