"""Converting the default operator set of a model, by ONNX's own converter and at any model size.

The converter knows nothing of values that a subgraph takes from outside, of function bodies and of
attributes that refer to a function's parameters. So every graph is given to it alone: what it takes
from outside as inputs, its If, Loop and Scan as opaque nodes of a domain of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableSequence

import onnx
import onnx_ir as ir

from effdl.errors import ModelError
from effdl.graph.clean import fix_names
from effdl.graph.io import check, external_tensors
from effdl.graph.proto import split_proto
from effdl.graph.shapes import Shapes, infer
from effdl.graph.walk import opset, subgraphs_in

_DEFAULT = ("", "ai.onnx")
_HELD = "effdl.held"
_NO_RULE = re.compile(r"No Adapter (?:To|From) Version \$\d+ for (\w+)")
Types = dict[str, onnx.TypeProto]


def newest_opset() -> int:
    """Return the newest default opset that the installed onnx knows."""
    return int(onnx.defs.onnx_opset_version())


def convert_opset(model: ir.Model, version: int) -> int:
    """Convert the default opset of ``model`` to ``version``, up or down; return the nodes concerned.

    Where no operator of the model differs between the two versions only the import changes.
    Otherwise every graph goes through ONNX's converter with its big weights left outside; names,
    declared shapes and metadata stay. Functions are converted too, nodes of other domains kept.

    Raises:
        ModelError: an operator cannot be converted, or the result is not valid; ``model`` is as before.
    """
    proto, weights = split_proto(model)
    source = opset(model)
    changes = 0
    if any(_changed(proto.graph.node, source, version)):
        types = _types(model, infer(model))
        _weights_to_inputs(proto, set(weights))
        changes += _Converter(source, version, types).graph(proto.graph)
    _set_version(proto.opset_import, version)
    for function in proto.functions:
        changes += _convert_function(function, version)
    converted = ir.from_proto(proto)
    _attach(converted.graph, model.graph, weights)
    _find_files(converted, model)
    fix_names(converted)
    check(converted)
    model.graph = converted.graph
    model.functions.clear()
    model.functions.update(converted.functions)
    return max(1, changes)


def _changed(
    nodes: MutableSequence[onnx.NodeProto], source: int, version: int
) -> Iterator[onnx.NodeProto]:
    """Yield the nodes, subgraphs included, whose operator the two opsets define differently."""
    for node in nodes:
        if node.domain in _DEFAULT and _since(node.op_type, source) != _since(
            node.op_type, version
        ):
            yield node
        for graph in _graphs(node):
            yield from _changed(graph.node, source, version)


def _since(op_type: str, version: int) -> int | None:
    if not onnx.defs.has(op_type, version, ""):
        return None
    return int(onnx.defs.get_schema(op_type, version, "").since_version)


def _gained_types(node: onnx.NodeProto, source: int, version: int) -> bool:
    """Whether the operator's newer version has the same inputs, attributes and defaults."""
    if version < source or _since(node.op_type, source) is None:
        return False
    if _since(node.op_type, version) is None:
        return False
    old, new = (onnx.defs.get_schema(node.op_type, v, "") for v in (source, version))
    return _signature(old) == _signature(new)


def _signature(schema: onnx.defs.OpSchema) -> tuple[object, ...]:
    attributes = {
        name: (a.type, a.required, a.default_value.SerializeToString())
        for name, a in schema.attributes.items()
    }
    ports = [(p.name, p.option) for p in (*schema.inputs, *schema.outputs)]
    return attributes, ports, len(schema.inputs)


def _graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _set_version(imports: MutableSequence[onnx.OperatorSetIdProto], version: int) -> None:
    for entry in imports:
        if entry.domain in _DEFAULT:
            entry.version = version


def _types(model: ir.Model, shapes: Shapes) -> Types:
    """Types by name, of the values whose name is unique: what subgraphs may take from outside."""
    found: Types = {}
    clashing: set[str] = set()
    for graph in (model.graph, *subgraphs_in(model.graph)):
        made = (o for n in graph for o in n.outputs)
        for value in dict.fromkeys((*graph.inputs, *graph.initializers.values(), *made)):
            dtype, dims = shapes.dtype(value), shapes.of(value)
            if value.name in found:
                clashing.add(value.name)
            if value.name and dtype is not None:
                found[value.name] = onnx.helper.make_tensor_type_proto(int(dtype), dims)
    return {name: t for name, t in found.items() if name not in clashing}


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


def _attach(graph: ir.Graph, old: ir.Graph, weights: Mapping[str, ir.TensorProtocol]) -> None:
    """Put the weights that stood outside back, and the graph inputs in their old order."""
    outside = {
        **{v.name: v for v in graph.initializers.values()},
        **{v.name: v for v in graph.inputs},
    }
    wanted = [outside[v.name] for v in old.inputs]
    graph.inputs.clear()
    graph.inputs.extend(wanted)
    for name, tensor in weights.items():
        value = outside[name]
        value.const_value = tensor
        graph.register_initializer(value)


def _find_files(converted: ir.Model, model: ir.Model) -> None:
    """Tell the weights in files, which only subgraphs still hold as such, where their folder is."""
    folders = {str(t.location): t.base_dir for t in external_tensors(model)}
    for tensor in external_tensors(converted):
        tensor.base_dir = folders[str(tensor.location)]


class _Converter:
    """Converts graphs from one opset to another, in place."""

    def __init__(self, source: int, version: int, types: Types) -> None:
        self._source, self._version, self._types = source, version, types

    def graph(self, graph: onnx.GraphProto) -> int:
        """Convert ``graph`` and its subgraphs; return the number of nodes concerned."""
        changes = 0
        held: dict[str, onnx.NodeProto] = {}
        for node in graph.node:
            inner = list(_graphs(node))
            changes += sum(self.graph(g) for g in inner)
            differs = _since(node.op_type, self._source) != _since(node.op_type, self._version)
            changes += node.domain in _DEFAULT and differs
            if inner or any(a.ref_attr_name for a in node.attribute):
                self._check_held(node, differs)
                original = onnx.NodeProto()
                original.CopyFrom(node)
                held[_key(node)] = original
                self._hold(node, inner)
        before = onnx.GraphProto()
        before.CopyFrom(graph)
        graph.CopyFrom(self._run(graph))
        _restore(graph, before, held)
        return changes

    def _check_held(self, node: onnx.NodeProto, differs: bool) -> None:
        """Refuse what cannot be left as it is. If, Loop and later Scans only gained types."""
        if node.domain not in _DEFAULT or not differs:
            return
        scan = node.op_type == "Scan" and min(self._source, self._version) < 9
        only_types = any(_graphs(node)) or _gained_types(node, self._source, self._version)
        if scan or not only_types:
            raise self._error(node.op_type)

    def _hold(self, node: onnx.NodeProto, inner: list[onnx.GraphProto]) -> None:
        """Turn ``node`` into an opaque one that also reads what its subgraphs take from outside."""
        inputs = [*node.input, *(name for g in inner for name in sorted(_taken(g)))]
        outputs = list(node.output)
        node.Clear()
        node.op_type, node.domain = "Held", _HELD
        node.input.extend(inputs)
        node.output.extend(outputs)

    def _run(self, graph: onnx.GraphProto) -> onnx.GraphProto:
        model = onnx.ModelProto(ir_version=10)
        model.graph.CopyFrom(graph)
        for name in sorted(_taken(graph)):
            value = model.graph.input.add(name=name)
            if name in self._types:
                value.type.CopyFrom(self._types[name])
        inputs = {v.name for v in model.graph.input}
        for tensor in graph.initializer:
            if tensor.name not in inputs:
                model.graph.input.append(
                    onnx.helper.make_tensor_value_info(
                        tensor.name, tensor.data_type, list(tensor.dims)
                    )
                )
        domains = {n.domain for n in graph.node} - set(_DEFAULT)
        for domain, version in [("", self._source), *((d, 1) for d in sorted(domains))]:
            model.opset_import.append(onnx.helper.make_opsetid(domain, version))
        try:
            return onnx.version_converter.convert_version(model, self._version).graph
        except Exception as e:  # RuntimeError, ValueError and the converter's own classes
            raise self._blame(re.sub(r"\s+", " ", str(e)), graph) from e

    def _blame(self, text: str, graph: onnx.GraphProto) -> ModelError:
        if found := _NO_RULE.search(text):
            return self._error(found[1])
        changed = sorted({n.op_type for n in _changed(graph.node, self._source, self._version)})
        gone = [t for t in changed if _since(t, self._version) is None]
        named = [t for t in changed if t.lower() in re.sub(r"[^a-z]", "", text.lower())]
        detail = text.rpartition("failed: ")[2].strip() if "failed: " in text else ""
        return self._error(*(gone or named or changed)[:3], detail=detail.rstrip(".")[:120])

    def _error(self, *operators: str, detail: str = "") -> ModelError:
        names = " or ".join(f"'{o}'" for o in operators) or "of the model"
        return ModelError(
            f"operator {names} cannot be converted from opset {self._source} to {self._version}"
            + (f" ({detail})" if detail else ""),
            hint="choose another version, or leave convert_opset out",
        )


def _key(node: onnx.NodeProto) -> str:
    return next((o for o in node.output if o), "")


def _taken(graph: onnx.GraphProto) -> set[str]:
    """Names that ``graph`` and its subgraphs read and do not make."""
    made = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    made |= {o for n in graph.node for o in n.output}
    read = {name for n in graph.node for name in n.input if name}
    read |= {v.name for v in graph.output}
    for node in graph.node:
        for inner in _graphs(node):
            read |= _taken(inner)
    return read - made


def _restore(
    graph: onnx.GraphProto, before: onnx.GraphProto, held: Mapping[str, onnx.NodeProto]
) -> None:
    """Bring back what the converter drops or makes up: names, declarations, metadata, held nodes."""
    makers = {o: n for n in before.node for o in n.output if o}
    for node in graph.node:
        maker = next((makers[o] for o in node.output if o in makers), None)
        if node.domain == _HELD:
            node.CopyFrom(held[_key(node)])
        elif maker is not None:
            node.name, node.doc_string = maker.name, maker.doc_string
            del node.metadata_props[:]
            node.metadata_props.extend(maker.metadata_props)
    graph.name, graph.doc_string = before.name, before.doc_string
    for part in ("input", "output", "value_info", "quantization_annotation", "metadata_props"):
        graph.ClearField(part)
        getattr(graph, part).extend(getattr(before, part))


def _convert_function(function: onnx.FunctionProto, version: int) -> int:
    source = next((e.version for e in function.opset_import if e.domain in _DEFAULT), 0)
    changes = 0
    if source and any(_changed(function.node, source, version)):
        graph = onnx.GraphProto(name=function.name, node=function.node)
        graph.input.extend(onnx.ValueInfoProto(name=name) for name in function.input)
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in function.output)
        changes = _Converter(source, version, {}).graph(graph)
        if graph.initializer:
            raise ModelError(
                f"the function '{function.name}' cannot be converted to opset {version}"
            )
        del function.node[:]
        function.node.extend(graph.node)
    _set_version(function.opset_import, version)
    return changes
