"""Protobuf at the edges: a model as a small message plus its weights, without copying them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import onnx_ir as ir

_PLACEHOLDER = "effdl-weights"
# ONNX Runtime takes these from numpy without a copy; 4-bit, 8-bit float and bfloat16 stay inside.
_NATIVE = {
    ir.DataType[name]
    for name in (
        *("FLOAT", "DOUBLE", "FLOAT16", "BOOL"),
        *("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"),
    )
}


@contextmanager
def _weights_outside(
    model: ir.Model, threshold: int, on_disk: str | None
) -> Iterator[dict[str, ir.TensorProtocol]]:
    """Stand in references for the main graph's big initializers; put the tensors back at the end."""
    originals: dict[str, ir.TensorProtocol] = {}
    outside: dict[str, ir.TensorProtocol] = {}
    try:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or (on_disk is not None and folder_of(tensor) == on_disk):
                continue
            originals[name] = tensor
            if tensor.nbytes < threshold or tensor.dtype not in _NATIVE:
                if isinstance(tensor, ir.ExternalTensor):
                    value.const_value = ir.Tensor(
                        tensor.numpy(),
                        dtype=tensor.dtype,
                        shape=ir.Shape(tensor.shape.numpy()),
                        name=name,
                    )
                continue
            outside[name] = tensor
            value.const_value = ir.ExternalTensor(
                _PLACEHOLDER,
                offset=0,
                length=tensor.nbytes,
                dtype=tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
                base_dir="",
            )
        yield outside
    finally:
        for name, tensor in originals.items():
            model.graph.initializers[name].const_value = tensor


def folder_of(tensor: ir.TensorProtocol | None) -> str | None:
    """Return the folder of the file that holds ``tensor``, None for one in memory."""
    return os.fspath(tensor.base_dir) if isinstance(tensor, ir.ExternalTensor) else None


def split_proto(
    model: ir.Model, threshold: int = 1024, on_disk: str | None = None
) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """Return the model as protobuf without its big weights, and those weights by name.

    Initializers of at least ``threshold`` bytes stand in the message as references to external data
    that exists nowhere: the message is for sessions and ``skeleton_proto``, not for a file. Those
    that lie in files of the folder ``on_disk`` stay true references to them.
    """
    with _weights_outside(model, threshold, on_disk) as weights:
        return ir.serde.serialize_model(model), weights


def skeleton_proto(model: ir.Model, threshold: int = 1024) -> onnx.ModelProto:
    """Return the model as protobuf with its big weights turned into graph inputs.

    Small at any model size, and valid where the model is: for ``onnx.checker`` and shape inference.
    """
    proto, weights = split_proto(model, threshold)
    inputs = {i.name for i in proto.graph.input}
    kept = []
    for tensor in proto.graph.initializer:
        if tensor.name not in weights:
            kept.append(tensor)
        elif tensor.name not in inputs:
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return proto
