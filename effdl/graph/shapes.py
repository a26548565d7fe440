"""Types and shapes of every value of a model, at any model size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
import onnx_ir as ir

from effdl.graph.dialects import adopt
from effdl.graph.dims import Dims, check_dims, dims_of, dynamic_dims
from effdl.graph.edit import rename_value
from effdl.graph.outline import outline
from effdl.graph.shape_values import Array, fold, graphs
from effdl.graph.stand_ins import stand_in
from effdl.graph.unchanged import remembered
from effdl.graph.walk import nodes_in, subgraphs_in
from effdl.graph.weights import constant_tensor

__all__ = ["Shapes", "dynamic_dims", "infer", "infer_into"]
_ROUNDS = 40
"""Inferences of one model: each may make a Shape constant that the next one needs."""
Types = dict[str, tuple[int, Dims | None]]


class Shapes:
    """What is known about the values of one model; ``infer`` makes it.

    Args:
        known: type and shape by value.
        branches: the If nodes whose condition does not depend on data, with the condition.
        dims: the dynamic dimensions that were given a value.
        names: shapes as inferred, without what is only declared.
        dynamic: whether an input has a dynamic dimension.
    """

    def __init__(
        self,
        known: Mapping[ir.Value, tuple[ir.DataType | None, Dims | None]],
        branches: Mapping[ir.Node, bool],
        dims: Mapping[str, int],
        names: Mapping[ir.Value, Dims] | None = None,
        dynamic: bool = False,
    ) -> None:
        self._known = known
        self._dynamic = dynamic
        self._names = names or {}
        self._branches = branches
        self.dims = dict(dims)

    def of(self, value: ir.Value | None) -> Dims | None:
        """Return the shape of ``value``: integers, names, None for unknown; None without a rank."""
        if value is None:
            return None
        if value in self._known:
            return self._known[value][1]
        if value.const_value is not None:
            return dims_of(ir.Shape(value.const_value.shape.numpy()))
        return _declared(value, self.dims, self._dynamic)

    def static(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """Return the shape of ``value`` when every dimension is a number, else None."""
        shape = self.of(value)
        if shape is None or not all(isinstance(d, int) for d in shape):
            return None
        return tuple(d for d in shape if isinstance(d, int))

    def symbols(self, value: ir.Value) -> tuple[str | None, ...]:
        """Return the name of each axis that inference proved to be as long as an input's of that name.

        Names that are only declared are left out: exports give one name to lengths that differ.
        """
        names = self._names.get(value)
        if names is None:
            return (None,) * len(self.of(value) or ())
        return tuple(d if isinstance(d, str) else None for d in names)

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """Return the element type of ``value``, None when unknown or no tensor."""
        if value is None:
            return None
        found = self._known.get(value)
        return found[0] if found is not None and found[0] is not None else value.dtype

    def branch(self, node: ir.Node) -> bool | None:
        """Return the condition of an If that follows from shapes and constants alone, else None."""
        return self._branches.get(node)


def infer(
    model: ir.Model,
    dims: Mapping[str, int] | None = None,
    values: Mapping[str, Array] | None = None,
) -> Shapes:
    """Infer types and shapes of all values, subgraphs included, without touching ``model``.

    ONNX's own inference, repeated while shape arithmetic (Shape, Gather, Concat, ... on small
    integers) can be computed; contrib operators are stood in for by standard ones of the same shape.
    What an operator that nobody knows makes keeps the shape it is declared with. Values inside
    functions keep what they declare. A model that did not change since is not inferred again.

    Args:
        model: the model.
        dims: values of dynamic input dimensions, by name or as ``input:axis``.
        values: what small inputs are assumed to hold, such as the mode an If asks for.

    Raises:
        UsageError: ``dims`` names what the model does not have.
    """
    pinned = check_dims(model, dims)
    if values:
        return _infer(model, pinned, values)
    key = ("shapes", *sorted(pinned.items()))
    return remembered(model, key, lambda: _infer(model, pinned, {}))


def _infer(model: ir.Model, pinned: dict[str, int], values: Mapping[str, Array]) -> Shapes:
    table = values_by_name(model)
    if table is None:
        twin = model.clone()
        table = _name_uniquely(model, twin)
        proto = outline(twin)
    else:
        proto = outline(model)
    _forget_declared(proto)
    _pin(proto, model, pinned)
    adopt(proto)
    stand_in(proto)
    dynamic = bool(dynamic_dims(model))
    types, conditions = _solve(proto, table, pinned, values, dynamic)
    symbols = {d for v in model.graph.inputs for d in dims_of(v.shape) or () if isinstance(d, str)}
    known = {}
    names: dict[ir.Value, Dims] = {}
    beyond = _beyond_unknown(model) if dynamic else set()
    for name, value in table.items():
        elem, shape = types.get(name, (0, None))
        tensor = constant_tensor(value)
        if tensor is not None:
            elem, shape = int(tensor.dtype), tuple(tensor.shape.numpy())
        dtype = ir.DataType(elem) if elem else value.dtype
        declared = _declared(value, pinned, dynamic and value not in beyond)
        shape = _drop_symbols(shape, symbols)
        known[value] = (dtype, _merge(shape, declared))
        if shape is not None:
            names[value] = shape
    branches = {}
    for name, condition in conditions.items():
        node = table[name].producer()
        if node is not None:
            branches[node] = condition
    return Shapes(known, branches, pinned, names, dynamic)


def infer_into(model: ir.Model) -> int:
    """Write inferred types and shapes into the values of ``model`` and return how many gained some.

    What is declared is never contradicted or weakened; graph inputs and outputs stay as they are.
    """
    shapes = infer(model)
    fixed = {*model.graph.inputs, *model.graph.outputs}
    changes = 0
    for value, (dtype, inferred) in shapes._known.items():
        if value in fixed or value.is_initializer():
            continue
        gained = False
        if value.type is None and dtype is not None and inferred is not None:
            value.type = ir.TensorType(dtype)
            gained = True
        declared = dims_of(value.shape)
        merged = _merge(declared, inferred)
        if merged is not None and merged != declared and value.type is not None:
            value.shape = ir.Shape(merged)
            gained = True
        changes += gained
    return changes


def values_by_name(model: ir.Model) -> dict[str, ir.Value] | None:
    """Return the values by name, None where two have one name."""
    table: dict[str, ir.Value] = {}
    for value, _ in _value_pairs(model, model):
        if value.name and table.setdefault(value.name, value) is not value:
            return None
    return table


def _name_uniquely(model: ir.Model, twin: ir.Model) -> dict[str, ir.Value]:
    """Give every value of ``twin`` a name of its own; return the values of ``model`` by that name.

    The branches of one If may use the same names, which makes a table by name ambiguous.
    """
    table: dict[str, ir.Value] = {}
    for value, other in list(_value_pairs(model, twin)):
        if not value.name:
            continue
        name, k = value.name, 1
        while name in table:
            k += 1
            name = f"{value.name}__{k}"
        if name != other.name:
            rename_value(other, name)  # clones share tensors, which carry the name
        table[name] = value
    return table


def _value_pairs(model: ir.Model, twin: ir.Model) -> Iterator[tuple[ir.Value, ir.Value]]:
    yield from zip(model.graph.inputs, twin.graph.inputs, strict=True)
    initializers = (g.graph.initializers.values() for g in (model, twin))
    optional = set(model.graph.inputs)
    yield from ((a, b) for a, b in zip(*initializers, strict=True) if a not in optional)
    for ours, theirs in zip(subgraphs_in(model.graph), subgraphs_in(twin.graph), strict=True):
        yield from zip(ours.inputs, theirs.inputs, strict=True)
        inner = (g.initializers.values() for g in (ours, theirs))
        own = set(ours.inputs)
        yield from ((a, b) for a, b in zip(*inner, strict=True) if a not in own)
    for node, other in zip(nodes_in(model.graph), nodes_in(twin.graph), strict=True):
        yield from zip(node.outputs, other.outputs, strict=True)


def _forget_declared(proto: onnx.ModelProto) -> None:
    """Drop declared shapes of outputs: stale ones are common and would win."""
    for graph in graphs(proto.graph):
        if graph is not proto.graph:  # names of dimensions mean something in the main graph only
            for port in graph.input:
                for dim in port.type.tensor_type.shape.dim:
                    if dim.HasField("dim_param"):
                        dim.Clear()
        for node in graph.node:
            while node.input and not node.input[-1]:
                del node.input[-1]  # ONNX infers nothing for a Loop with such an input
        for output in graph.output:
            if output.type.HasField("tensor_type"):
                output.type.tensor_type.ClearField("shape")


def _pin(proto: onnx.ModelProto, model: ir.Model, dims: Mapping[str, int]) -> None:
    for graph in graphs(proto.graph):
        for value in graph.input:
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if dim.HasField("dim_value") and dim.dim_value < 0:
                    dim.Clear()
                number = dims.get(dim.dim_param)
                if number is None and graph is proto.graph and not dim.HasField("dim_value"):
                    number = dims.get(f"{value.name}:{axis}")
                if number is not None:
                    dim.dim_value = number


def _pinned(shape: Dims | None, dims: Mapping[str, int]) -> Dims | None:
    return (
        None if shape is None else tuple(dims.get(d, d) if isinstance(d, str) else d for d in shape)
    )


def _declared(value: ir.Value, dims: Mapping[str, int], dynamic: bool) -> Dims | None:
    """Return the shape ``value`` is declared with, as far as it can be believed.

    Exporters write the sizes of their example into outputs, and whoever makes an input dynamic
    afterwards leaves the rest as it was: with a dynamic input, the sizes of what nodes make are
    believed only where an operator that nobody knows makes it. A sequence has no shape of its own.
    """
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        return None
    shape = _pinned(dims_of(value.shape), dims)
    node = value.producer()
    if shape is None or not dynamic or node is None or node.domain not in ("", "ai.onnx"):
        return shape
    return tuple(None if isinstance(d, int) else d for d in shape)


def _beyond_unknown(model: ir.Model) -> set[ir.Value]:
    """Return what is computed from the outputs of operators that nobody knows.

    Nothing can be inferred there: what the exporter declared is all there is.
    """
    found: set[ir.Value] = set()
    for node in nodes_in(model.graph):
        unknown = node.domain not in ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
        if unknown or any(v in found for v in node.inputs):
            found.update(node.outputs)
    return found


def _solve(
    proto: onnx.ModelProto,
    table: Mapping[str, ir.Value],
    dims: Mapping[str, int],
    values: Mapping[str, Array],
    dynamic: bool,
) -> tuple[Types, dict[str, bool]]:
    """Infer and fold by turns until nothing is gained."""
    branches: dict[str, bool] = {}
    types: Types = {}
    seeded = False
    for _ in range(_ROUNDS):
        types = _infer_once(proto, types)
        if fold(proto, types, branches, values):
            continue
        if seeded or not _seed(proto, types, table, dims, dynamic):
            break
        seeded = True
    return types, branches


def solve(proto: onnx.ModelProto, model: ir.Model) -> Types | None:
    """Infer the outline of a model in place, folding what can be; None where ONNX cannot type it."""
    _forget_declared(proto)
    adopt(proto)
    stand_in(proto)
    return _solve(proto, {}, {}, {}, bool(dynamic_dims(model)))[0] or None


def _infer_once(proto: onnx.ModelProto, previous: Types) -> Types:
    try:
        result = onnx.shape_inference.infer_shapes(proto, data_prop=True, strict_mode=False)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return previous  # a graph ONNX cannot type: what is declared is all there is
    types: Types = {}
    for graph in graphs(result.graph):
        for value in (*graph.input, *graph.value_info, *graph.output):
            if value.type.HasField("tensor_type"):
                tensor = value.type.tensor_type
                types[value.name] = (
                    tensor.elem_type,
                    _proto_dims(tensor) if tensor.HasField("shape") else None,
                )
        for constant in graph.initializer:
            types[constant.name] = (constant.data_type, tuple(constant.dims))
    return types


def _proto_dims(tensor: onnx.TypeProto.Tensor) -> Dims:
    return tuple(
        d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim
    )


def _seed(
    proto: onnx.ModelProto,
    types: Types,
    table: Mapping[str, ir.Value],
    dims: Mapping[str, int],
    dynamic: bool,
) -> bool:
    """Declare what the model itself says about values that inference left open."""
    seeded = False
    for graph in graphs(proto.graph):
        outputs = {o.name: o for o in graph.output}
        for name in (o for node in graph.node for o in node.output):
            value = table.get(name)
            if value is None or (graph is proto.graph and name in outputs):
                continue
            found = types.get(name, (0, None))[1]
            merged = _merge(found, _declared(value, dims, dynamic))
            if merged != found and merged is not None and value.dtype is not None:
                shape = [d if isinstance(d, int) else None for d in merged]
                info = onnx.helper.make_tensor_value_info(name, int(value.dtype), shape)
                if name in outputs:
                    outputs[name].CopyFrom(info)
                else:
                    graph.value_info.append(info)
                seeded = True
    return seeded


def _merge(first: Dims | None, second: Dims | None) -> Dims | None:
    """Return what both shapes know; where they disagree the first is right."""
    if first is None or second is None or len(first) != len(second):
        return first if first is not None else second
    return tuple(_merge_dim(a, b) for a, b in zip(first, second, strict=True))


def _merge_dim(first: int | str | None, second: int | str | None) -> int | str | None:
    if isinstance(first, int):
        return first
    if isinstance(second, int):
        return second
    return first if first is not None else second


def _drop_symbols(shape: Dims | None, symbols: set[str]) -> Dims | None:
    """Forget the names that inference makes up for unknown dimensions."""
    if shape is None:
        return None
    return tuple(d if isinstance(d, int) or d in symbols else None for d in shape)
