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
    metadata, and all types that are declared of what nodes make. Subgraphs get copies of the small
    constants around them that they read: ONNX does not look for those outside. Value names must be
    unique over all graphs. Half as expensive as serializing the model.
    """
    proto = onnx.ModelProto(ir_version=model.ir_version)
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    _Drawing(proto.graph).fill(proto.graph, model.graph, {})
    proto.functions.extend(ir.serde.serialize_function(f) for f in model.functions.values())
    return proto


class _Drawing:
    def __init__(self, main: onnx.GraphProto) -> None:
        self.main = main

    def fill(
        self, proto: onnx.GraphProto, graph: ir.Graph, around: dict[str, onnx.TensorProto]
    ) -> None:
        """Draw one graph; ``around`` holds the small constants that it sees outside."""
        proto.name = graph.name or "graph"
        proto.input.extend(ir.serde.serialize_value(v) for v in graph.inputs)
        given = {v.name for v in graph.inputs}
        seen = dict(around)
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None:
                continue
            if tensor.nbytes >= _SMALL:
                if name not in given:
                    self.outside(name, tensor)
                continue
            proto.initializer.append(_constant(name, tensor))
            if name not in given:
                seen[name] = proto.initializer[-1]
        for node in graph:
            self.node(proto, node, around, seen)
        proto.output.extend(ir.serde.serialize_value(v) for v in graph.outputs)

    def node(
        self,
        proto: onnx.GraphProto,
        node: ir.Node,
        around: dict[str, onnx.TensorProto],
        seen: dict[str, onnx.TensorProto],
    ) -> None:
        tensor = constant_tensor(node.outputs[0]) if is_op(node, "Constant") else None
        if tensor is not None:
            name = node.outputs[0].name or ""
            if tensor.nbytes >= _SMALL:
                self.outside(name, tensor)
                return
            seen[name] = _constant(name, tensor)
        made = proto.node.add(op_type=node.op_type, domain=node.domain, overload=node.overload)
        made.input.extend([v.name or "" if v is not None else "" for v in node.inputs])
        made.output.extend([v.name or "" for v in node.outputs])
        for name in made.input:
            if name in around:
                proto.initializer.append(around[name])
                del around[name]
        for attr in node.attributes.data.values():
            self.attribute(made.attribute.add(), attr, seen)

    def attribute(
        self, proto: onnx.AttributeProto, attr: ir.Attr, seen: dict[str, onnx.TensorProto]
    ) -> None:
        if attr.is_ref() or attr.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            proto.CopyFrom(ir.serde.serialize_attribute(attr))
            return
        many = attr.type is ir.AttributeType.GRAPHS
        proto.name = attr.name
        proto.type = onnx.AttributeProto.GRAPHS if many else onnx.AttributeProto.GRAPH
        if not many:
            self.fill(proto.g, attr.as_graph(), dict(seen))
        else:
            for inner in attr.as_graphs():
                self.fill(proto.graphs.add(), inner, dict(seen))

    def outside(self, name: str, tensor: ir.TensorProtocol) -> None:
        """Let a constant come from outside: only its type and shape count."""
        dims = list(tensor.shape.numpy())
        self.main.input.append(onnx.helper.make_tensor_value_info(name, int(tensor.dtype), dims))


def _constant(name: str, tensor: ir.TensorProtocol) -> onnx.TensorProto:
    if isinstance(tensor, ir.ExternalTensor):
        tensor = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape)
    proto = ir.serde.serialize_tensor(tensor)
    proto.name = name
    return proto
