"""What a model costs: multiply-accumulates, parameters, bytes of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from effdl.graph.cost_ops import formula_of
from effdl.graph.dims import guess_dims, selector_arrays
from effdl.graph.shapes import Shapes, infer
from effdl.graph.walk import all_nodes, int_attr, ints_attr, is_op, opset
from effdl.graph.weights import constant_tensor, scalar, weight_tensors

_MAX_TRIPS = 1 << 31
"""A Loop bound above this is an exporter's way of saying "until the condition is false"."""


@dataclass(frozen=True)
class Cost:
    """What one node costs.

    Args:
        macs: of one execution; None when its operator or its shapes are unknown. The bodies of
            If, Loop and Scan are not part of it.
        params: numbers in its constant inputs, 4-bit ones counted one by one.
        weight_bytes: bytes of these.
    """

    macs: int | None
    params: int
    weight_bytes: int


@dataclass(frozen=True)
class NodeCost:
    """One node of a model.

    Args:
        node: the node; of an inlined copy when the model has functions.
        name: its name; ``op_type`` with the domain before it, if that is not ONNX's own.
        macs, params, weight_bytes: see ``Cost``.
        times: executions per inference; 0 in a branch that is not taken, None when unknown.
    """

    node: ir.Node = field(repr=False)
    name: str
    op_type: str
    macs: int | None
    params: int
    weight_bytes: int
    times: int | None


@dataclass(frozen=True)
class ModelCost:
    """What one inference of a model costs.

    Args:
        macs: multiply-accumulates at ``dims``, without those of ``unknown_ops``; None when there
            are such and nothing else was counted.
        unknown_ops: operators that could not be counted, each once, in order.
        per_node: every node, the bodies of If, Loop and Scan included.
        params: numbers in all distinct weights.
        weight_bytes: their bytes by dtype name, such as ``FLOAT``.
        dims: the values of dynamic dimensions assumed.
        shapes: of all values, of the inlined copy when the model has functions.
    """

    macs: int | None
    unknown_ops: tuple[str, ...]
    per_node: tuple[NodeCost, ...]
    params: int
    weight_bytes: dict[str, int]
    dims: dict[str, int]
    shapes: Shapes = field(repr=False)


def node_cost(node: ir.Node, shapes: Shapes) -> Cost:
    """Return what ``node`` costs by itself.

    Args:
        node: any node; an unknown operator is no error.
        shapes: from ``graph.shapes.infer`` of its model.
    """
    formula = formula_of(node)
    macs = 0 if _has_body(node) else formula(node, shapes) if formula is not None else None
    tensors = {id(t): t for v in node.inputs if (t := _weight(v)) is not None}
    packed = _packed_numbers([node])
    return Cost(
        macs,
        sum(_numbers(t, packed) for t in tensors.values()),
        sum(t.nbytes for t in tensors.values()),
    )


def model_cost(model: ir.Model, dims: Mapping[str, int] | None = None) -> ModelCost:
    """Return what one inference costs.

    A Scan counts its body once per step, a Loop once per trip of its bound, an If its larger branch,
    or the one that its condition chooses when that follows from shapes. Functions count where called.

    Args:
        model: the model; stays as it is.
        dims: values of dynamic dimensions; ``graph.dims.guess_dims`` fills in the others.

    Raises:
        UsageError: ``dims`` names what the model does not have.
    """
    if model.functions:
        model = model.clone()
        InlinePass()(model)
    chosen = guess_dims(model, dims)
    shapes = infer(model, chosen, selector_arrays(model, chosen))
    total = _Counter(shapes, opset(model)).graph(model.graph)
    macs = sum(c.macs * c.times for c in total.nodes if c.macs is not None and c.times)
    unknown = tuple(dict.fromkeys(c.op_type for c in total.nodes if _uncounted(c)))
    return ModelCost(
        macs=None if unknown and not macs else macs,
        unknown_ops=unknown,
        per_node=tuple(total.nodes),
        params=params(model),
        weight_bytes=weight_bytes(model),
        dims=chosen,
        shapes=shapes,
    )


def params(model: ir.Model) -> int:
    """Return how many numbers the weights hold, a shared weight counted once."""
    packed = _packed_numbers(all_nodes(model))
    return sum(_numbers(t, packed) for t in weight_tensors(model))


def weight_bytes(model: ir.Model) -> dict[str, int]:
    """Return the bytes of all distinct weights by dtype name, largest first."""
    sizes: dict[str, int] = {}
    for tensor in weight_tensors(model):
        sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.nbytes
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))


def op_name(node: ir.Node) -> str:
    """Return the operator with its domain before it, if that is not ONNX's own."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def _weight(value: ir.Value | None) -> ir.TensorProtocol | None:
    if value is not None and value.is_initializer():
        return value.const_value  # also where a caller may override it, as in files before IR 4
    return constant_tensor(value)


def _has_body(node: ir.Node) -> bool:
    return is_op(node, "If", "Loop", "Scan")


def _uncounted(cost: NodeCost) -> bool:
    return cost.times is None or (cost.macs is None and cost.times > 0)


def _numbers(tensor: ir.TensorProtocol, packed: Mapping[int, int]) -> int:
    if tensor.dtype == ir.DataType.STRING:
        return 0
    return packed.get(id(tensor), tensor.size)


def _packed_numbers(nodes: Iterable[ir.Node]) -> dict[int, int]:
    """Numbers inside the byte tensors of MatMulNBits, which hold several in one element."""
    found: dict[int, int] = {}
    for node in nodes:
        if not is_op(node, "MatMulNBits", domain="com.microsoft"):
            continue
        rows, columns = int_attr(node, "K", 0), int_attr(node, "N", 0)
        blocks = columns * -(-rows // max(int_attr(node, "block_size", 1), 1))
        for index, numbers in ((1, rows * columns), (3, blocks)):
            tensor = constant_tensor(node.inputs[index]) if index < len(node.inputs) else None
            if tensor is not None and tensor.dtype == ir.DataType.UINT8:
                found[id(tensor)] = numbers
    return found


@dataclass
class _Tally:
    """The nodes of one graph, their executions per execution of the graph."""

    nodes: list[NodeCost]

    @property
    def macs(self) -> int:
        return sum(c.macs * c.times for c in self.nodes if c.macs is not None and c.times)

    def scaled(self, times: int | None) -> Iterator[NodeCost]:
        """Yield the nodes as executed ``times`` as often; what costs nothing needs no number."""
        for c in self.nodes:
            count = None if times is None or c.times is None else c.times * times
            if count is None and c.macs == 0:
                count = c.times
            yield NodeCost(c.node, c.name, c.op_type, c.macs, c.params, c.weight_bytes, count)


class _Counter:
    def __init__(self, shapes: Shapes, version: int) -> None:
        self.shapes = shapes
        self.version = version

    def graph(self, graph: ir.Graph) -> _Tally:
        nodes: list[NodeCost] = []
        for node in graph:
            cost = node_cost(node, self.shapes)
            nodes.append(
                NodeCost(
                    node,
                    node.name or "",
                    op_name(node),
                    cost.macs,
                    cost.params,
                    cost.weight_bytes,
                    1,
                )
            )
            if is_op(node, "If"):
                nodes += self.branches(node)
            elif _has_body(node):
                nodes += self.graph(node.attributes["body"].as_graph()).scaled(self.trips(node))
        return _Tally(nodes)

    def branches(self, node: ir.Node) -> Iterator[NodeCost]:
        tallies = {
            taken: self.graph(node.attributes[name].as_graph())
            for taken, name in ((True, "then_branch"), (False, "else_branch"))
        }
        decided = self.shapes.branch(node)
        if decided is None:
            decided = tallies[True].macs >= tallies[False].macs
        for taken, tally in tallies.items():
            yield from tally.scaled(1 if taken == decided else 0)

    def trips(self, node: ir.Node) -> int | None:
        """Executions of the body of a Loop or Scan, None when they depend on the data."""
        if node.op_type == "Loop":
            bound = scalar(node.inputs[0])
            return int(bound) if bound is not None and 0 <= bound < _MAX_TRIPS else None
        scanned = int_attr(node, "num_scan_inputs", 0)
        axes = ints_attr(node, "scan_input_axes") or (0,) * scanned
        first = len(node.inputs) - scanned
        if self.version < 9 or not 0 < first + scanned <= len(node.inputs) or not scanned:
            return None
        shape = self.shapes.of(node.inputs[first])
        length = shape[axes[0]] if shape is not None and len(shape) > axes[0] else None
        return length if isinstance(length, int) else None
