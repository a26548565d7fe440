"""Shape arithmetic computed: small integers that follow from known shapes become constants."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from effdl.graph.dims import Dims
from effdl.graph.shape_kernels import compute

Array = npt.NDArray[np.generic]
_MAX_ELEMENTS = 1024
_ARITHMETIC = """
Abs Add And Cast Ceil Concat ConstantOfShape Div Equal Expand Flatten Floor Gather Greater
GreaterOrEqual Identity Less LessOrEqual Max Min Mod Mul Neg Not Or Pow Range ReduceMax ReduceMin
ReduceProd ReduceSum Reshape Round ScatterND Slice Split Sqrt Squeeze Sub Transpose Unsqueeze Where Xor
"""
_COMPUTABLE = frozenset(_ARITHMETIC.split())


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield ``graph`` and every graph inside it."""
    yield graph
    for node in graph.node:
        for inner in _inner(node):
            yield from graphs(inner)


def set_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Make ``nodes``, which may come from ``graph`` itself, its nodes."""
    copies = [_copy(n) for n in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def fold(
    proto: onnx.ModelProto,
    types: Mapping[str, tuple[int, Dims | None]],
    branches: dict[str, bool],
    values: Mapping[str, Array],
) -> bool:
    """Replace what can be computed by Constant nodes and decided Ifs by their branch.

    Value names must be unique over all graphs. Values keep their names, so that a later inference
    speaks about the same ones.

    Args:
        proto: the model to edit, its big weights taken out.
        types: element type and shape by value name, from inference.
        branches: receives the first output of each decided If with its condition.
        values: graph inputs that are assumed to hold these numbers.

    Returns:
        Whether anything was replaced.
    """
    versions = {("" if o.domain == "ai.onnx" else o.domain): o.version for o in proto.opset_import}
    return _Folder(types, branches, versions.get("", 0)).graph(proto.graph, values)


def take_branch(node: onnx.NodeProto, condition: bool) -> list[onnx.NodeProto]:
    """Return what an If does when its condition is ``condition``."""
    name = "then_branch" if condition else "else_branch"
    taken = next(a.g for a in node.attribute if a.name == name)
    weights = []
    for tensor in taken.initializer:
        constant = onnx.helper.make_node("Constant", [], [tensor.name])
        constant.attribute.append(onnx.helper.make_attribute("value", tensor))
        weights.append(constant)
    ends = [
        onnx.helper.make_node("Identity", [inner.name], [outer])
        for inner, outer in zip(taken.output, node.output, strict=False)
        if outer
    ]
    return [*weights, *taken.node, *ends]


class _Folder:
    def __init__(
        self,
        types: Mapping[str, tuple[int, Dims | None]],
        branches: dict[str, bool],
        opset: int,
    ) -> None:
        self.types = types
        self.branches = branches
        self.opset = opset

    def graph(self, graph: onnx.GraphProto, outer: Mapping[str, Array]) -> bool:
        known = dict(outer)
        overridable = {i.name for i in graph.input}
        for tensor in graph.initializer:
            if tensor.name not in overridable and _is_small(tensor):
                known[tensor.name] = numpy_helper.to_array(tensor)
        nodes: list[onnx.NodeProto] = []
        changed = moved = False
        for node in graph.node:
            made = self.node(node, known)
            nodes += [node] if made is None else made
            changed = changed or made is not None
            if made is not None and len(made) == 1:
                nodes[-1] = node
                node.CopyFrom(made[0])
            moved = moved or (made is not None and len(made) != 1)
        if moved:
            set_nodes(graph, nodes)
        inner = [self.graph(g, known) for n in graph.node for g in _inner(n)]
        return changed or any(inner)

    def node(self, node: onnx.NodeProto, known: dict[str, Array]) -> list[onnx.NodeProto] | None:
        """Return what stands for ``node``, constants or the branch it takes; None: it stays."""
        if node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "Constant":
            if (array := _constant(node)) is not None:
                known[node.output[0]] = array
            return None
        if node.op_type == "If" and node.input[0] in known:
            return self.branch(node, bool(known[node.input[0]].reshape(-1)[0]))
        results = self.evaluate(node, known)
        if results is None:
            return None
        known.update(results)
        return [_constant_node(name, array) for name, array in results.items()]

    def branch(self, node: onnx.NodeProto, condition: bool) -> list[onnx.NodeProto]:
        self.branches[next(o for o in node.output if o)] = condition
        return take_branch(node, condition)

    def evaluate(self, node: onnx.NodeProto, known: Mapping[str, Array]) -> dict[str, Array] | None:
        if node.op_type in ("Shape", "Size"):
            return self.shape(node)
        inputs = {name: known[name] for name in node.input if name in known}
        if node.op_type not in _COMPUTABLE or not node.input:
            return None
        if any(name and name not in inputs for name in node.input) or _too_big(node, inputs):
            return None
        return _run(node, inputs, self.opset, self.types)

    def shape(self, node: onnx.NodeProto) -> dict[str, Array] | None:
        _, dims = self.types.get(node.input[0], (0, None))
        if dims is None:
            return None
        ends = {a.name: a.i for a in node.attribute}
        part = dims[ends.get("start", 0) : ends.get("end", len(dims))]
        if not all(isinstance(d, int) for d in part):
            return None
        array = np.array(part, np.int64)
        return {
            node.output[0]: array if node.op_type == "Shape" else np.array(array.prod(), np.int64)
        }


def _run(
    node: onnx.NodeProto,
    inputs: Mapping[str, Array],
    opset: int,
    types: Mapping[str, tuple[int, Dims | None]],
) -> dict[str, Array] | None:
    names = [o for o in node.output if o]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    given = [inputs.get(name) for name in node.input]
    small = compute(node.op_type, given, attributes) if len(names) == 1 else None
    if small is not None:
        return {names[0]: small}
    from onnx.reference import ReferenceEvaluator  # hundreds of modules

    graph = onnx.helper.make_graph(
        [_copy(node)],
        "fold",
        [
            onnx.helper.make_tensor_value_info(
                n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape
            )
            for n, a in inputs.items()
        ],
        [onnx.helper.make_tensor_value_info(n, types.get(n, (0, None))[0], None) for n in names],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    try:
        with np.errstate(all="raise"):
            results = ReferenceEvaluator(model).run(names, dict(inputs))
    except Exception:  # whatever it cannot do at this opset or with these numbers stays a node
        return None
    arrays = {name: np.asarray(r) for name, r in zip(names, results, strict=True)}
    for name, array in arrays.items():
        elem = types.get(name, (0, None))[0]
        if array.size > _MAX_ELEMENTS or array.dtype == np.object_:
            return None
        if elem and onnx.helper.tensor_dtype_to_np_dtype(elem) != array.dtype:
            return None
    return arrays


def _too_big(node: onnx.NodeProto, inputs: Mapping[str, Array]) -> bool:
    """Whether the result would not be small, for the operators that make much from little."""
    if node.op_type in ("ConstantOfShape", "Expand"):
        wanted = inputs[node.input[-1]].astype(np.float64)
        return bool(np.prod(np.maximum(wanted, 1)) > _MAX_ELEMENTS)
    if node.op_type == "Range":
        start, limit, delta = (float(inputs[n].reshape(-1)[0]) for n in node.input)
        return delta == 0 or (limit - start) / delta > _MAX_ELEMENTS
    return False


def _constant(node: onnx.NodeProto) -> Array | None:
    for attr in node.attribute:
        match attr.name:
            case "value" if _is_small(attr.t):
                return numpy_helper.to_array(attr.t)
            case "value_int":
                return np.array(attr.i, np.int64)
            case "value_ints":
                return np.array(attr.ints, np.int64)
            case "value_float":
                return np.array(attr.f, np.float32)
            case "value_floats":
                return np.array(attr.floats, np.float32)
    return None


def _is_small(tensor: TensorProto) -> bool:
    """Whether ``tensor`` is worth knowing: small numbers that are here, not in a file."""
    here = tensor.data_location != TensorProto.EXTERNAL
    return (
        here and tensor.data_type != TensorProto.STRING and math.prod(tensor.dims) <= _MAX_ELEMENTS
    )


def _constant_node(name: str, array: Array) -> onnx.NodeProto:
    return onnx.helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name))


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _inner(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attr in node.attribute:
        if attr.type == onnx.AttributeProto.GRAPH:
            yield attr.g
        elif attr.type == onnx.AttributeProto.GRAPHS:
            yield from attr.graphs
