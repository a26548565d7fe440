"""Which nodes become float16, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from effdl.data.feeds import Feeds
from effdl.graph.shapes import Shapes
from effdl.graph.walk import ints_attr, is_op, only_user, producer
from effdl.graph.weights import constant, constant_tensor, scalar
from effdl.passes.convert._float16_range import constant_fault, is_mask, largest
from effdl.passes.convert._float16_slots import FLOAT, HALF, NEUTRAL, Slots, slots_of

_SIZE_ARITHMETIC = (
    *("Cast", "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Floor", "Ceil", "Round", "Mod", "Min"),
    *("Max", "Clip", "Sqrt", "Pow", "Reciprocal", "Gather", "Slice", "Concat", "Split", "Where"),
    *("Squeeze", "Unsqueeze", "Reshape", "Identity", "ReduceProd", "ReduceSum", "ReduceMax"),
    *("ReduceMin", "Equal", "Less", "Greater", "Transpose"),
)
_AFTER_MEAN_SQUARE = ("Add", "Sqrt", "Reciprocal", "Pow", "Mul", "Div")
_CARRY_MASKS = ("Add", "Sub", "Mul", "Min", "Max", *NEUTRAL)
_WIDE_INTEGERS = frozenset(
    ir.DataType[f"{sign}INT{bits}"] for sign in ("", "U") for bits in (16, 32, 64)
)


@dataclass
class Plan:
    """What the pass will do.

    Args:
        half: the nodes that become float16, in graph order, with the positions that change.
        kept: the nodes with float32 values that stay, with the reason; empty for those the options
            leave out and for Casts.
    """

    half: dict[ir.Node, Slots] = field(default_factory=dict)
    kept: dict[ir.Node, str] = field(default_factory=dict)

    def keep(self, node: ir.Node, reason: str) -> None:
        """Leave ``node`` in float32; the first reason stays."""
        if self.half.pop(node, None) is not None:
            self.kept[node] = reason


def make_plan(
    model: ir.Model,
    shapes: Shapes,
    excluded: Callable[[ir.Node], str | None],
    *,
    keep_io_types: bool,
    limit: float,
    feeds: Feeds | None,
) -> Plan:
    """Decide about every node of the main graph, without touching the model.

    Args:
        model: the model.
        shapes: its inferred types.
        excluded: the reason why the options leave a node out (may be empty), None if they do not.
        keep_io_types: graph inputs and outputs stay float32.
        limit: activations above it, on ``feeds``, stay float32.
        feeds: calibration samples or None.
    """
    plan = Plan()
    functions = {(f.domain, f.name) for f in model.functions.values()}
    for node in model.graph:
        if is_op(node, "Constant"):
            continue
        slots = slots_of(node, shapes.dtype, model.opset_imports, functions)
        if isinstance(slots, Slots):
            plan.half[node] = slots
        elif slots is not None:
            plan.kept[node] = slots
    for node in list(plan.half):
        reason = excluded(node)
        reason = _neighbour_fault(node, shapes) if reason is None else reason
        if reason is not None:
            plan.keep(node, reason)
    for node in _size_arithmetic(model, shapes):
        plan.keep(node, "it computes sizes or indices, which float16 would round")
    for node in _crashing_transposes(plan, shapes):
        plan.keep(
            node, "ONNX Runtime's CPU provider crashes on this Transpose before a float16 MatMul"
        )
    for node in _mean_squares(plan):
        plan.keep(node, "squares of activations overflow float16 from 256 on")
    _check_constants(plan)
    if feeds is not None and len(feeds):
        _check_activations(model, plan, limit, feeds)
    _settle_neutral(model, plan, keep_io_types)
    return plan


def _neighbour_fault(node: ir.Node, shapes: Shapes) -> str | None:
    """Return why what ``node`` reads or what reads it forces it to stay float32."""
    if _beside_quantized(node):
        return "it stands beside a quantized node, whose kernels take float32"
    for value in node.inputs:
        if value is not None and is_default(value) and shapes.dtype(value) == FLOAT:
            return f"its weight '{value.name}' is also a graph input: run simplify before"
    if any(_captured(o) for o in node.outputs):
        return "a subgraph returns its output"
    return None


def is_default(value: ir.Value) -> bool:
    """Whether ``value`` is a graph input with an initial value, which a caller may replace."""
    return value.is_graph_input() and value.is_initializer()


def _beside_quantized(node: ir.Node) -> bool:
    if any(producer(v, "DequantizeLinear") for v in node.inputs if v is not None):
        return True
    return any(
        is_op(u.node, "QuantizeLinear", "DynamicQuantizeLinear")
        for o in node.outputs
        for u in o.uses()
    )


def _captured(value: ir.Value) -> bool:
    """Whether an inner graph returns ``value`` as it is: there is no use to put a Cast before."""
    node = value.producer()
    return (
        value.is_graph_output()
        and node is not None
        and node.graph is not None
        and not any(o is value for o in node.graph.outputs)
    )


def _size_arithmetic(model: ir.Model, shapes: Shapes) -> list[ir.Node]:
    """Float nodes that compute from sizes alone, or lead from integers to integers."""
    sizes: set[ir.Value] = set()
    whole: set[ir.Value] = set()
    ends: list[ir.Node] = []
    found: dict[ir.Node, None] = {}
    for node in model.graph:
        inputs = [v for v in node.inputs if v is not None and constant_tensor(v) is None]
        if is_op(node, "Shape", "Size"):
            sizes.update(node.outputs)
        elif not inputs or not is_op(node, *_SIZE_ARITHMETIC):
            continue
        elif all(v in sizes for v in inputs):
            sizes.update(node.outputs)
            found[node] = None
        elif is_op(node, "Cast") and shapes.dtype(node.inputs[0]) in _WIDE_INTEGERS:
            whole.update(node.outputs)
        elif all(v in sizes or v in whole for v in inputs):
            whole.update(node.outputs)
            if is_op(node, "Cast") and shapes.dtype(node.outputs[0]) in _WIDE_INTEGERS:
                ends.append(node)
    while ends:
        node = ends.pop()
        if node not in found:
            found[node] = None
            ends += [p for v in node.inputs if v in whole and (p := producer(v)) is not None]
    return list(found)


def _mean_squares(plan: Plan) -> Iterator[ir.Node]:
    """Yield the nodes from a square to the root of its mean: a written-out norm."""
    for node in list(plan.half):
        squares = (is_op(node, "Pow") and scalar(node.inputs[1]) == 2) or (
            is_op(node, "Mul") and node.inputs[0] is node.inputs[1]
        )
        reduced = only_user(node.outputs[0]) if squares else None
        if node.op_type == "Mul" and squares:
            users = list(dict.fromkeys(u.node for u in node.outputs[0].uses()))
            reduced = users[0] if len(users) == 1 else None
        if reduced is None or not is_op(reduced, "ReduceMean", "ReduceSum"):
            continue
        yield from (node, reduced)
        user = only_user(reduced.outputs[0])
        while user is not None and is_op(user, *_AFTER_MEAN_SQUARE):
            operands = [v for v in user.inputs if v is not None and constant_tensor(v) is None]
            if len(operands) != 1:
                break
            yield user
            user = only_user(user.outputs[0])


def _crashing_transposes(plan: Plan, shapes: Shapes) -> list[ir.Node]:
    """Transposes of the first axis before a MatMul whose other operand has another rank.

    Seen in ONNX Runtime 1.32 on the CPU: it puts a Cast between the two, its MatmulTransposeFusion
    swaps Cast and Transpose, then declines to fuse operands of unequal rank, yet removes the
    Transpose, and the process ends with a segmentation fault.
    """
    found = []
    for node in plan.half:
        perm = ints_attr(node, "perm")
        if not is_op(node, "Transpose") or len(perm) < 3 or perm[0] != 1:
            continue
        for user, index in node.outputs[0].uses():
            other = shapes.of(user.inputs[1 - index]) if is_op(user, "MatMul") else perm
            if other is None or len(other) != len(perm):
                found.append(node)
                break
    return found


def _check_constants(plan: Plan) -> None:
    """Keep the nodes whose constants do not fit, and what carries such constants on."""
    over: set[ir.Value] = set()
    for node, slots in list(plan.half.items()):
        reason = None
        for i in sorted(slots.inputs):
            value = node.inputs[i]
            array = constant(value)
            if value is not None and value in over:
                reason = f"'{value.name}' is outside the range of float16"
            elif value is not None and array is not None:
                reason = reason or constant_fault(node, i, array, value.name or "")
        if is_op(node, "ConstantOfShape") and (attr := node.attributes.get("value")) is not None:
            reason = constant_fault(node, 0, attr.as_tensor().numpy(), "value")
        if reason is not None:
            plan.keep(node, reason)
            if is_op(node, *NEUTRAL):
                over.update(node.outputs)


def _check_activations(model: ir.Model, plan: Plan, limit: float, feeds: Feeds) -> None:
    """Keep the nodes that read or write numbers above ``limit`` on the feeds."""
    seen = {node: _values(node, slots) for node, slots in plan.half.items()}
    values = [v for vs in seen.values() for v in vs]
    if not values:
        return
    top = largest(model, values, _masks(plan), feeds)
    for node, touched in seen.items():
        worst = next((v for v in touched if not top[v] <= limit), None)
        if worst is not None:
            plan.keep(node, f"'{worst.name}' reaches {top[worst]:.4g} on the calibration data")


def _values(node: ir.Node, slots: Slots) -> list[ir.Value]:
    inputs = [node.inputs[i] for i in sorted(slots.inputs)]
    values = [v for v in inputs if v is not None and constant_tensor(v) is None]
    return values + [node.outputs[i] for i in sorted(slots.outputs)]


def _masks(plan: Plan) -> set[ir.Value]:
    """Values that hold attention masks: huge on purpose, moved to the end of the range."""
    masks: set[ir.Value] = set()
    for node, slots in plan.half.items():
        if not is_op(node, *_CARRY_MASKS):
            continue
        arrays = {i: constant(node.inputs[i]) for i in slots.inputs}
        starts = any(a is not None and is_mask(node, i, a) for i, a in arrays.items())
        filler = node.attributes.get("value") if is_op(node, "ConstantOfShape") else None
        starts |= filler is not None and is_mask(node, 0, filler.as_tensor().numpy())
        if starts or any(v in masks for v in node.inputs):
            masks.update(node.outputs)
    return masks


def _settle_neutral(model: ir.Model, plan: Plan, keep_io_types: bool) -> None:
    """Leave groups of nodes that only move data in float32 where no neighbour is float16."""
    neutral = [n for n in plan.half if is_op(n, *NEUTRAL)]
    outside = FLOAT if keep_io_types else HALF
    for group in _groups(neutral, plan):
        members = set(group)
        if not any(HALF in _neighbours(n, members, plan, model, outside) for n in group):
            for node in group:
                quiet = is_op(node, "Cast", "Shape", "Size")
                plan.keep(node, "" if quiet else "it only moves data between float32 nodes")


def _groups(nodes: Iterable[ir.Node], plan: Plan) -> list[list[ir.Node]]:
    """Split ``nodes`` into sets that are connected by values which may become float16."""
    members = list(nodes)
    parent = {n: n for n in members}

    def root(node: ir.Node) -> ir.Node:
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for node in members:
        for i in plan.half[node].inputs:
            source = producer(node.inputs[i])
            if (
                source is not None
                and source in parent
                and _writes_half(source, node.inputs[i], plan)
            ):
                parent[root(node)] = root(source)
    groups: dict[ir.Node, list[ir.Node]] = {}
    for node in members:
        groups.setdefault(root(node), []).append(node)
    return list(groups.values())


def _writes_half(node: ir.Node | None, value: ir.Value | None, plan: Plan) -> bool:
    if node is None or node not in plan.half:
        return False
    return any(node.outputs[i] is value for i in plan.half[node].outputs)


def _neighbours(
    node: ir.Node, members: set[ir.Node], plan: Plan, model: ir.Model, outside: ir.DataType
) -> Iterator[ir.DataType]:
    """Yield the dtypes that the nodes around a group write and read."""
    slots = plan.half[node]
    for i in slots.inputs:
        value = node.inputs[i]
        if value is None or constant_tensor(value) is not None:
            continue
        source = value.producer()
        if source is None:
            yield outside
        elif source not in members:
            yield HALF if _writes_half(source, value, plan) else FLOAT
    for i in slots.outputs:
        for user, index in node.outputs[i].uses():
            if user not in members:
                other = plan.half.get(user)
                yield HALF if other is not None and index in other.inputs else FLOAT
        if any(o is node.outputs[i] for o in model.graph.outputs):
            yield outside
