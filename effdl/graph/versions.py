"""Converting the default operator set of a model, by ONNX's own converter and at any model size."""

from __future__ import annotations

import re
from collections.abc import Iterable

import onnx
import onnx_ir as ir

from effdl.errors import ModelError
from effdl.graph.io import check
from effdl.graph.proto import split_proto
from effdl.graph.walk import opset

_DEFAULT = ("", "ai.onnx")
_NO_RULE = re.compile(r"No Adapter (?:To|From) Version \$\d+ for (\w+)")
_OPERATOR = re.compile(r"(?:operator|op_type:|for op|Node \()\s*'?(\w+)")


def newest_opset() -> int:
    """Return the newest default opset that the installed onnx knows."""
    return int(onnx.defs.onnx_opset_version())


def convert_opset(model: ir.Model, version: int) -> int:
    """Convert the default opset of ``model`` to ``version``, up or down; return the nodes that changed.

    Where no operator of the model differs between the two versions only the import changes.
    Otherwise the graph goes through ONNX's converter with its big weights left outside; names,
    declared shapes and metadata stay. Functions are converted likewise, nodes of other domains kept.

    Raises:
        ModelError: an operator cannot be converted, or the result is not valid; ``model`` is as before.
    """
    source = opset(model)
    twin = model.clone()
    changes = _convert_graph(twin, source, version)
    for function in twin.functions.values():
        changes += _convert_function(function, version)
    check(twin)
    model.graph = twin.graph
    model.functions.clear()
    model.functions.update(twin.functions)
    return max(1, changes)


def changed_operators(graph: ir.Graph, source: int, version: int) -> list[str]:
    """Return the operators of ``graph`` that the two opsets define differently, sorted."""
    types = {n.op_type for n in graph.all_nodes() if n.domain in _DEFAULT}
    return sorted(t for t in types if _since(t, source) != _since(t, version))


def _since(op_type: str, version: int) -> int | None:
    if not onnx.defs.has(op_type, version, ""):
        return None
    return int(onnx.defs.get_schema(op_type, version, "").since_version)


def _set_version(imports: dict[str, int], version: int) -> None:
    imports.pop("ai.onnx", None)
    imports[""] = version


def _convert_graph(model: ir.Model, source: int, version: int) -> int:
    changed = set(changed_operators(model.graph, source, version))
    if not changed:
        _set_version(model.opset_imports, version)
        return 0
    old = model.graph
    count = sum(n.op_type in changed and n.domain in _DEFAULT for n in old.all_nodes())
    proto, weights = split_proto(model)
    del proto.functions[:]
    _weights_to_inputs(proto, set(weights))
    result = _run(proto, source, version)
    fresh = ir.from_proto(result)
    _attach(fresh.graph, old, weights)
    _restore(fresh.graph, old)
    model.graph = fresh.graph
    return count


def _weights_to_inputs(proto: onnx.ModelProto, names: set[str]) -> None:
    inputs = {i.name for i in proto.graph.input}
    kept = [t for t in proto.graph.initializer if t.name not in names]
    for tensor in proto.graph.initializer:
        if tensor.name in names and tensor.name not in inputs:
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)


def _run(proto: onnx.ModelProto, source: int, version: int) -> onnx.ModelProto:
    try:
        return onnx.version_converter.convert_version(proto, version)
    except Exception as e:  # the converter raises RuntimeError, ValueError and its own classes
        text = re.sub(r"\s+", " ", str(e))
        found = _NO_RULE.search(text) or _OPERATOR.search(text)
        what = f"operator '{found[1]}' cannot be converted" if found else "it cannot be converted"
        reason = "" if _NO_RULE.search(text) else f" ({text[-160:]})"
        raise ModelError(
            f"{what} from opset {source} to {version}{reason}",
            hint="choose another version, or leave convert_opset out",
        ) from e


def _attach(graph: ir.Graph, old: ir.Graph, weights: dict[str, ir.TensorProtocol]) -> None:
    """Put the weights that stood outside back, and the graph inputs in their old order."""
    inputs = {v.name: v for v in graph.inputs}
    wanted = [inputs[v.name] for v in old.inputs]
    graph.inputs.clear()
    graph.inputs.extend(wanted)
    for name, tensor in weights.items():
        value = inputs[name]
        value.const_value = tensor
        graph.register_initializer(value)


def _restore(graph: ir.Graph, old: ir.Graph) -> None:
    """Bring back what the converter drops or makes up: names, declarations and metadata."""
    graph.name, graph.doc_string = old.name, old.doc_string
    graph.metadata_props.update(old.metadata_props)
    values = {v.name: v for v in _values(old)}
    for value in _values(graph):
        before = values.get(value.name)
        if before is not None:
            value.type, value.shape = before.type, before.shape
            value.doc_string = before.doc_string
            value.metadata_props.update(before.metadata_props)
            value.meta.update(before.meta)
        elif value.producer() is not None and not value.is_graph_output():
            value.type = value.shape = None
    makers = {o.name: n for n in old.all_nodes() for o in n.outputs if o.name}
    for node in graph.all_nodes():
        maker = next((makers[o.name] for o in node.outputs if o.name in makers), None)
        if maker is not None:
            node.name, node.doc_string = maker.name, maker.doc_string
            node.metadata_props.update(maker.metadata_props)


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    for inner in (graph, *graph.subgraphs()):
        yield from inner.inputs
        yield from inner.initializers.values()
        for node in inner:
            yield from (o for o in node.outputs if o.name)


def _convert_function(function: ir.Function, version: int) -> int:
    imports = function.opset_imports
    source = imports.get("", imports.get("ai.onnx", 0))
    if not source or source == version:
        return 0
    changed = changed_operators(function.graph, source, version)
    if changed:
        raise ModelError(
            f"operator '{changed[0]}' in the function '{function.name}' cannot be converted from "
            f"opset {source} to {version}",
            hint="inline the model's functions first",
        )
    _set_version(imports, version)
    return 0

