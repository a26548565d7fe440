"""One node at a time on constant inputs, by ONNX Runtime's own kernels so that numbers stay the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import shape_inference

from effdl.graph.weights import Array

_FATAL = 4
_SMALL = 4096
# Their output can be far larger than their inputs: never run one whose output shape is not known.
_SIZED_BY_VALUE = frozenset(
    ("ConstantOfShape", "Expand", "OneHot", "Pad", "Range", "Resize", "Tile", "Upsample")
)
_NUMPY = {
    np.dtype(getattr(np, name)): ir.DataType[onnx_name]
    for name, onnx_name in {
        "float16": "FLOAT16",
        "float32": "FLOAT",
        "float64": "DOUBLE",
        "bool_": "BOOL",
        **{f"{s}int{b}": f"{s.upper()}INT{b}" for s in ("", "u") for b in (8, 16, 32, 64)},
    }.items()
}
_OUTPUTS = {
    "tensor(float)",
    "tensor(double)",
    "tensor(float16)",
    "tensor(bool)",
    "tensor(string)",
} | {f"tensor({s}int{b})" for s in ("", "u") for b in (8, 16, 32, 64)}


class Kernels:
    """Evaluates nodes; equal nodes on equal types share a session."""

    def __init__(self) -> None:
        self._sessions: dict[bytes, Any] = {}

    def run(
        self, node: ir.Node, inputs: Sequence[Array | None], opsets: Mapping[str, int], limit: int
    ) -> list[Array] | str:
        """Return the outputs of ``node``, or why they cannot be computed.

        Args:
            node: a node without subgraphs.
            inputs: an array per input, None where it is absent.
            opsets: the versions that apply to ``node``.
            limit: bytes of output above which nothing is computed.
        """
        dtypes = [None if a is None else _dtype(a) for a in inputs]
        if any(a is not None and d is None for a, d in zip(inputs, dtypes, strict=True)):
            return "a constant of this type cannot be computed with here"
        proto = _model(node, dtypes, opsets)
        size = _output_bytes(proto, inputs)
        if size is None and (
            node.op_type in _SIZED_BY_VALUE
            or sum(a.size for a in inputs if a is not None) > 1 << 20
        ):
            return "its size cannot be told before computing it"
        if size is not None and size > limit:
            return f"the result would take {size:,} bytes"
        session = self._session(proto)
        if isinstance(session, str):
            return session
        feed = {f"i{k}": _feedable(a) for k, a in enumerate(inputs) if a is not None}
        try:
            results = session.run(None, feed)
        except Exception as e:  # ONNX Runtime raises half a dozen unrelated classes
            return f"ONNX Runtime cannot compute it: {_short(e)}"
        return [np.asarray(r) for r in results]

    def _session(self, proto: onnx.ModelProto) -> Any:
        import onnxruntime as ort

        key = proto.SerializeToString(deterministic=True)
        if key in self._sessions:
            return self._sessions[key]
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session: Any
        try:
            session = ort.InferenceSession(key, options, providers=["CPUExecutionProvider"])
        except Exception as e:  # ONNX Runtime raises half a dozen unrelated classes
            session = f"ONNX Runtime cannot compute it: {_short(e)}"
        else:
            if any(o.type not in _OUTPUTS for o in session.get_outputs()):
                session = "its result is no plain tensor"
        self._sessions[key] = session
        return session


def _dtype(array: Array) -> ir.DataType | None:
    return ir.DataType.STRING if array.dtype.kind in "OSU" else _NUMPY.get(array.dtype)


def _feedable(array: Array) -> Array:
    if array.dtype.kind not in "OSU":
        return array
    words = [w.decode() if isinstance(w, bytes) else str(w) for w in array.ravel()]
    return np.array(words, dtype=object).reshape(array.shape)


def _model(
    node: ir.Node, dtypes: Sequence[ir.DataType | None], opsets: Mapping[str, int]
) -> onnx.ModelProto:
    inner = onnx.NodeProto(op_type=node.op_type, domain=node.domain)
    inner.attribute.extend(ir.serde.serialize_attribute(a) for a in node.attributes.values())
    inner.input.extend("" if d is None else f"i{k}" for k, d in enumerate(dtypes))
    inner.output.extend(f"o{k}" if o.name else "" for k, o in enumerate(node.outputs))
    graph = onnx.GraphProto(name="node", node=[inner])
    for k, dtype in enumerate(dtypes):
        if dtype is not None:
            graph.input.append(onnx.helper.make_tensor_value_info(f"i{k}", int(dtype), None))
    graph.output.extend(onnx.ValueInfoProto(name=o) for o in inner.output if o)
    model = onnx.ModelProto(graph=graph, ir_version=10)
    for domain in sorted({"", "" if node.domain == "ai.onnx" else node.domain}):
        version = opsets.get(domain, opsets.get("ai.onnx", 1) if domain == "" else 1)
        model.opset_import.append(onnx.helper.make_opsetid(domain, version))
    return model


def _output_bytes(proto: onnx.ModelProto, inputs: Sequence[Array | None]) -> int | None:
    """Bytes of all outputs by ONNX's shape inference, None when it cannot tell."""
    probe = onnx.ModelProto()
    probe.CopyFrom(proto)
    for port in probe.graph.input:
        array = inputs[int(port.name[1:])]
        assert array is not None
        port.type.tensor_type.shape.Clear()
        for size in array.shape:
            port.type.tensor_type.shape.dim.add().dim_value = size
        port.type.tensor_type.shape.SetInParent()
        if array.size <= _SMALL and array.dtype.kind not in "OSU":
            probe.graph.initializer.append(onnx.numpy_helper.from_array(array, port.name))
    try:
        inferred = shape_inference.infer_shapes(probe, data_prop=True)
    except Exception:  # shape inference raises several unrelated classes
        return None
    total = 0
    for output in inferred.graph.output:
        tensor = output.type.tensor_type
        if not tensor.HasField("shape") or not all(
            d.HasField("dim_value") for d in tensor.shape.dim
        ):
            return None
        count = prod(d.dim_value for d in tensor.shape.dim)
        total += count * _item_bytes(tensor.elem_type)
    return total


def _item_bytes(elem_type: int) -> int:
    dtype = ir.DataType(elem_type)
    if dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        return 16
    return -(-dtype.bitwidth // 8)


def _short(e: Exception) -> str:
    text = re.sub(r"\s+", " ", str(e)).strip()
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    return text if len(text) <= 120 else text[:117] + "..."
