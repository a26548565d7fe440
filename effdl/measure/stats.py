"""The static facts of a model: what is in it, what it weighs, what one inference costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from effdl.data.random import resolve_dims
from effdl.graph.cost import model_cost, op_name
from effdl.graph.dims import dims_of, dynamic_dims, known_dims, model_inputs
from effdl.graph.io import file_digest, files_size
from effdl.graph.walk import all_nodes, opset
from effdl.measure.size import zstd_size
from effdl.report import ModelStats, NodeStats


def model_stats(
    model: ir.Model,
    path: Path | None,
    dims: Mapping[str, int] | None = None,
    zstd: bool = True,
) -> ModelStats:
    """Return the facts of a model.

    Args:
        model: the model.
        path: its file, for hash and sizes; None for a model in memory.
        dims: values of dynamic dimensions for the MACs; names that the model does not have are
            left alone, since a pass may have fixed them. Others get what random feeds get.
        zstd: whether to measure the compressed size, which reads the whole file.
    """
    chosen = resolve_dims(model, known_dims(model, dims))
    cost = model_cost(model, chosen)
    return ModelStats(
        path="" if path is None else str(path),
        sha256="" if path is None else file_digest(path),
        opset=opset(model),
        opsets=dict(model.opset_imports),
        ir_version=model.ir_version,
        nodes=sum(1 for _ in all_nodes(model)),
        ops=dict(sorted(Counter(op_name(n) for n in all_nodes(model)).items())),
        params=cost.params,
        macs=cost.macs,
        macs_unknown=cost.unknown_ops,
        weight_bytes=cost.weight_bytes,
        file_bytes=0 if path is None else files_size(path),
        zstd_bytes=zstd_size(path) if path is not None and zstd else None,
        inputs={v.name or "": describe(v) for v in model_inputs(model)},
        outputs={v.name or "": describe(v) for v in model.graph.outputs},
        dims=chosen,
        dynamic=tuple(dynamic_dims(model)),
    )


def node_stats(model: ir.Model, dims: Mapping[str, int] | None = None) -> tuple[NodeStats, ...]:
    """Return every node with its cost, in the order of the graph.

    Args:
        model: the model.
        dims: values of dynamic dimensions, as in ``model_stats``.
    """
    cost = model_cost(model, resolve_dims(model, known_dims(model, dims)))
    return tuple(
        NodeStats(n.name, n.op_type, n.macs, n.params, n.weight_bytes) for n in cost.per_node
    )


def describe(value: ir.Value) -> str:
    """Return type and shape of a value as ``float[batch,3,?,?]``."""
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        return type(value.type).__name__.removesuffix("Type").lower()
    dtype = value.dtype.name.lower() if value.dtype is not None else "?"
    shape = dims_of(value.shape)
    if shape is None:
        return dtype
    return f"{dtype}[{','.join('?' if d is None else str(d) for d in shape)}]"
