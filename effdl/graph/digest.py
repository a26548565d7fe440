"""Digests of all that computes a value: where they are equal, so are the values for equal inputs."""

from __future__ import annotations

import hashlib

import onnx_ir as ir
from onnx_ir import serde

from effdl.graph.walk import nodes_in, subgraphs_in, subgraphs_of


def digests(model: ir.Model) -> dict[str, bytes]:
    """Return the digest of each value of the main graph, by name.

    It covers the operators and weights on the way to the value, and the names of the graph inputs there;
    not the names of other values, nor what is computed beside or behind it.
    """
    found: dict[ir.Value | None, bytes] = {None: b""}
    for value in model.graph.inputs:
        found[value] = _hash(b"input", (value.name or "").encode())
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        found[value] = _of_tensor(value.const_value)
    functions = [serde.serialize_function(f) for f in model.functions.values()]
    common = _hash(
        repr(sorted(model.opset_imports.items())).encode(),
        *(f.SerializeToString(deterministic=True) for f in functions),
    )
    for node in model.graph:
        whole = _hash(common, *_form(node), *(found[v] for v in _read(node, found)))
        for index, output in enumerate(node.outputs):
            found[output] = _hash(whole, str(index).encode())
    return {v.name or "": digest for v, digest in found.items() if v is not None}


def _form(node: ir.Node) -> list[bytes]:
    attributes = [node.attributes[name] for name in sorted(node.attributes)]
    protos = [serde.serialize_attribute(a) for a in attributes]
    name = f"{node.domain} {node.op_type} {node.overload} {len(node.inputs)}"
    return [name.encode(), *(p.SerializeToString(deterministic=True) for p in protos)]


def _read(node: ir.Node, known: dict[ir.Value | None, bytes]) -> list[ir.Value | None]:
    """Return the inputs of a node, and those of the main graph's values that graphs inside it read."""
    inside = [v for top in subgraphs_of(node) for n in nodes_in(top) for v in n.inputs]
    tops = [g for top in subgraphs_of(node) for g in (top, *subgraphs_in(top))]
    inside += [v for g in tops for v in g.outputs]
    return [*node.inputs, *dict.fromkeys(v for v in inside if v is not None and v in known)]


def _of_tensor(tensor: ir.TensorProtocol) -> bytes:
    kind = f"{tensor.dtype.name} {tuple(tensor.shape.numpy())}".encode()
    if tensor.dtype is ir.DataType.STRING:
        return _hash(kind, *tensor.numpy().ravel().tolist())
    return _hash(kind, tensor.tobytes())


def _hash(*parts: bytes) -> bytes:
    """Return the digest of the parts, which cannot run into each other."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.digest()
