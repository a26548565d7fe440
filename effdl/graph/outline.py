"""A model as a small message for shape inference: computation, inputs, small constants, nothing else."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from effdl.graph.walk import is_op
from effdl.graph.weights import constant_tensor

_SMALL = 1024
"""Bytes below which the numbers of a constant are of interest; a larger one becomes an input."""


def outline(model: ir.Model) -> onnx.ModelProto:
    """Return what shape inference reads of ``model``.

    Left out: large constants, which become inputs of the main graph, names of nodes, documentation,
    metadata, and all types that are declared of what nodes make. Value names must be unique over all
    graphs. Half as expensive as serializing the model.
    """
    proto = onnx.ModelProto(ir_version=model.ir_version)
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    _fill(proto.graph, model.graph, proto.graph)
    proto.functions.extend(ir.serde.serialize_function(f) for f in model.functions.values())
    return proto


def _fill(proto: onnx.GraphProto, graph: ir.Graph, main: onnx.GraphProto) -> None:
    proto.name = graph.name or "graph"
    proto.input.extend(ir.serde.serialize_value(v) for v in graph.inputs)
    given = {v.name for v in graph.inputs}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        if tensor.nbytes < _SMALL:
            proto.initializer.append(_constant(name, tensor))
        elif name not in given:
            _add_input(main, name, tensor)
    for node in graph:
        large = constant_tensor(node.outputs[0]) if is_op(node, "Constant") else None
        if large is not None and large.nbytes >= _SMALL:
            _add_input(main, node.outputs[0].name or "", large)
            continue
        made = proto.node.add(op_type=node.op_type, domain=node.domain, overload=node.overload)
        made.input.extend([v.name or "" if v is not None else "" for v in node.inputs])
        made.output.extend([v.name or "" for v in node.outputs])
        for attr in node.attributes.data.values():
            _attribute(made.attribute.add(), attr, main)
    proto.output.extend(ir.serde.serialize_value(v) for v in graph.outputs)


def _add_input(main: onnx.GraphProto, name: str, tensor: ir.TensorProtocol) -> None:
    """Let a constant come from outside: only its type and shape count."""
    dims = list(tensor.shape.numpy())
    main.input.append(onnx.helper.make_tensor_value_info(name, int(tensor.dtype), dims))


def _attribute(proto: onnx.AttributeProto, attr: ir.Attr, main: onnx.GraphProto) -> None:
    if attr.is_ref() or attr.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        proto.CopyFrom(ir.serde.serialize_attribute(attr))
        return
    many = attr.type is ir.AttributeType.GRAPHS
    proto.name = attr.name
    proto.type = onnx.AttributeProto.GRAPHS if many else onnx.AttributeProto.GRAPH
    if not many:
        _fill(proto.g, attr.as_graph(), main)
    else:
        for inner in attr.as_graphs():
            _fill(proto.graphs.add(), inner, main)


def _constant(name: str, tensor: ir.TensorProtocol) -> onnx.TensorProto:
    if isinstance(tensor, ir.ExternalTensor):
        tensor = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape)
    proto = ir.serde.serialize_tensor(tensor)
    proto.name = name
    return proto
