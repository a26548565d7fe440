"""Nodes that change nothing, and neighbours that undo or repeat each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from effdl.graph.algebra import (
    BROADCAST,
    drop_zero_states,
    merge_clips,
    merge_factors,
    skip_expand,
    swap_where,
)
from effdl.graph.dedup import Report, dropout_is_identity
from effdl.graph.edit import can_forward, forward, has_reference, remove_if_unused, roots
from effdl.graph.elements import Facts
from effdl.graph.neighbours import (
    merge_axes,
    merge_concats,
    merge_into_gemm,
    merge_reduction,
    merge_slices,
)
from effdl.graph.scope import Scope
from effdl.graph.shapes import Shapes
from effdl.graph.views import merge_views
from effdl.graph.walk import int_attr, ints_attr, is_op, only_user, subgraphs_of
from effdl.graph.weights import Array, Names, constant_tensor

_FAR = (1 << 31) - 1
_IDEMPOTENT = ("Abs", "Ceil", "Floor", "Relu", "Round", "Sign")
_INVOLUTION = ("Neg", "Not")


def remove_identities(
    model: ir.Model, shapes: Shapes, known: dict[ir.Value, Array], touch: Report, skip: Report
) -> int:
    """Reroute around nodes that change nothing; merge neighbours. Returns the number of rewrites."""
    changes = 0
    names = Names(model)
    for root, imports, is_function in roots(model):
        facts = Facts(shapes, known)
        scope = Scope(shapes, facts, imports.get("", imports.get("ai.onnx", 0)))
        editor = _Editor(scope, names, root if is_function else None, touch, skip)
        changes += editor.run(root)
    return changes


@dataclass
class _Editor:
    scope: Scope
    names: Names
    function: ir.Graph | None
    touch: Report
    skip: Report

    def run(self, graph: ir.Graph) -> int:
        changes = 0
        for node in list(graph):
            self.scope.facts.visit(node)
            for inner in subgraphs_of(node):
                changes += self.run(inner)
            if node.graph is None or node.domain not in ("", "ai.onnx") or has_reference(node):
                continue
            changes += self._pass_through(node) or self._merge(node)
        return changes

    def _pass_through(self, node: ir.Node) -> int:
        source = nothing_done(node, self.scope)
        if source is None:
            if is_op(node, "Dropout") and not dropout_is_identity(node, self.scope.opset):
                self.skip(node, "this Dropout is in training mode")
            return 0
        output = node.outputs[0]
        if not can_forward(output, source):
            self.skip(node, "it does nothing, but leads from an input or a constant to an output")
            return 0
        forward(output, source)
        remove_if_unused(node)
        self.touch(node, "does nothing, removed")
        return 1

    def _merge(self, node: ir.Node) -> int:
        for rule in (_merge_transposes, _merge_casts, _plain_cast):
            what = rule(node, self.scope)
            if what:
                self.touch(node, what)
                return 1
        names = self.names if self._may_add(node) else None
        for merge in _MERGES.get(node.op_type, ()):
            what = merge(node, self.scope, names)
            if what:
                self.touch(node, what)
                return 1
        what = merge_views(node, self.scope.shapes, self.names) if names is not None else ""
        if what:
            self.touch(node, what)
        return int(bool(what))

    def _may_add(self, node: ir.Node) -> bool:
        """Whether an initializer may be added where ``node`` stands."""
        return node.graph is not None and node.graph is not self.function and self.scope.opset >= 5


Rule = Callable[[ir.Node, Scope], bool]
Merge = Callable[[ir.Node, Scope, Names | None], str]
_MERGES: dict[str, tuple[Merge, ...]] = {
    "Clip": (merge_clips,),
    "Concat": (merge_concats,),
    "Gemm": (merge_into_gemm,),
    "Mul": (merge_factors, skip_expand),
    "Slice": (merge_slices,),
    "Squeeze": (merge_reduction, merge_axes),
    "Unsqueeze": (merge_reduction, merge_axes),
    "Where": (swap_where, skip_expand),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), (drop_zero_states,)),
    **{op: (skip_expand,) for op in BROADCAST if op not in ("Mul", "Where")},
}


def nothing_done(node: ir.Node, scope: Scope) -> ir.Value | None:
    """Return the input that the first output of ``node`` always equals, None when it may differ."""
    if not node.inputs or node.inputs[0] is None:
        return None
    if any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        return None
    if is_op(node, *_INVOLUTION, *_IDEMPOTENT):
        return _undone(node)
    if is_op(node, "And", "Max", "Min", "Or") and len(set(node.inputs)) == 1:
        return node.inputs[0]
    if is_op(node, "Add", "Sub", "Mul", "Div", "Pow", "And", "Or"):
        return _neutral(node, scope)
    if is_op(node, "Where"):
        return _where(node, scope)
    rule = _RULES.get(node.op_type)
    return node.inputs[0] if rule is not None and rule(node, scope) else None


def _undone(node: ir.Node) -> ir.Value | None:
    source = node.inputs[0]
    before = source.producer() if source is not None else None
    if before is None or not is_op(before, node.op_type):
        return None
    return before.inputs[0] if is_op(node, *_INVOLUTION) else source


def _neutral(node: ir.Node, scope: Scope) -> ir.Value | None:
    """x+0, x-0, x*1, x/1, x**1, x and true, x or false; the constant must not widen the shape."""
    a, b = node.inputs[0], node.inputs[1]
    number = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1, "Pow": 1, "And": 1, "Or": 0}[node.op_type]
    pairs = [(a, b)]
    if node.op_type in ("Add", "Mul", "And", "Or") and scope.opset >= 7:
        pairs.append((b, a))
    for data, constant in pairs:
        if data is None or scope.uniform.number(constant) != number:
            continue
        if scope.covers(data, constant):
            return data
        tensor = constant_tensor(constant)
        if tensor is None:
            continue
        rank = scope.rank(data)
        narrow = tensor.size == 1 and (
            len(tensor.shape) == 0 or (rank is not None and len(tensor.shape) <= rank)
        )
        if narrow or scope.same_static(data, node.outputs[0]):
            return data
    return None


def _where(node: ir.Node, scope: Scope) -> ir.Value | None:
    """Where with a condition that is the same everywhere, when the other inputs do not widen it."""
    condition = scope.uniform.number(node.inputs[0])
    if condition is None:
        return None
    taken, other = node.inputs[1:] if condition else node.inputs[:0:-1]
    if taken is None:
        return None
    kept = all(scope.covers(taken, v) for v in (node.inputs[0], other))
    return taken if kept or scope.same_static(taken, node.outputs[0]) else None


def _always(node: ir.Node, scope: Scope) -> bool:
    return True


def _single(node: ir.Node, scope: Scope) -> bool:
    return len(node.inputs) == 1


def _one_part(node: ir.Node, scope: Scope) -> bool:
    return len(node.outputs) == 1 and scope.opset >= 2


def _cast(node: ir.Node, scope: Scope) -> bool:
    to = node.attributes.get("to")
    if to is None or to.type != ir.AttributeType.INT:
        return False  # opset 1 names the type in words
    return scope.shapes.dtype(node.inputs[0]) == ir.DataType(to.as_int())


def _cast_like(node: ir.Node, scope: Scope) -> bool:
    dtype = scope.shapes.dtype(node.inputs[0])
    return dtype is not None and dtype == scope.shapes.dtype(node.inputs[1])


def _dropout(node: ir.Node, scope: Scope) -> bool:
    return dropout_is_identity(node, scope.opset)


def _transpose(node: ir.Node, scope: Scope) -> bool:
    perm = ints_attr(node, "perm")
    if perm:
        return perm == tuple(range(len(perm)))
    assert node.inputs[0] is not None
    rank = scope.rank(node.inputs[0])
    return rank is not None and rank < 2


def _same_shape(node: ir.Node, scope: Scope) -> bool:
    """For operators that keep the elements in order: an equal shape is an equal tensor."""
    assert node.inputs[0] is not None
    return scope.same_static(node.inputs[0], node.outputs[0])


def _flatten(node: ir.Node, scope: Scope) -> bool:
    assert node.inputs[0] is not None
    two = scope.rank(node.inputs[0]) == 2 and int_attr(node, "axis", 1) in (1, -1)
    return two or _same_shape(node, scope)


def _reshape(node: ir.Node, scope: Scope) -> bool:
    if _same_shape(node, scope):
        return True
    goal, dims = scope.facts.input(node, 1), scope.facts.dims(node.inputs[0])
    if goal is None or dims is None or len(goal.items) != len(dims):
        return False
    copied = 0 if not int_attr(node, "allowzero", 0) else None
    other = [i for i, d in zip(goal.items, dims, strict=True) if i not in (d, copied)]
    # When all axes but one stay, the one that is worked out stays too.
    return not other or other == [-1]


def _expand(node: ir.Node, scope: Scope) -> bool:
    goal, dims = scope.facts.input(node, 1), scope.facts.dims(node.inputs[0])
    if goal is None or dims is None:
        return _same_shape(node, scope)
    fits = len(goal.items) <= len(dims)
    return fits and all(i in (1, d) for i, d in zip(goal.items[::-1], dims[::-1], strict=False))


def _tile(node: ir.Node, scope: Scope) -> bool:
    repeats = scope.facts.ints(node, 1, "repeats") if scope.opset >= 6 else None
    return repeats is not None and set(repeats) <= {1}


def _pad(node: ir.Node, scope: Scope) -> bool:
    pads = scope.facts.ints(node, 1, "pads")
    return pads is not None and set(pads) <= {0}


def _slice(node: ir.Node, scope: Scope) -> bool:
    facts = scope.facts
    starts, ends = facts.ints(node, 1, "starts"), facts.ints(node, 2, "ends")
    if starts is None or ends is None or len(starts) != len(ends):
        return False
    given = "axes" in node.attributes or (len(node.inputs) > 3 and node.inputs[3] is not None)
    axes = facts.ints(node, 3, "axes") if given else tuple(range(len(starts)))
    stepped = len(node.inputs) > 4 and node.inputs[4] is not None
    steps = facts.ints(node, 4, "steps") if stepped else (1,) * len(starts)
    if axes is None or steps is None or set(steps) - {1} or any(starts) or len(axes) != len(ends):
        return False
    dims = scope.shapes.of(node.inputs[0])
    return all(
        end >= _FAR or _covers(end, axis, dims) for end, axis in zip(ends, axes, strict=True)
    )


def _covers(end: int, axis: int, dims: tuple[int | str | None, ...] | None) -> bool:
    if dims is None:
        return False
    size = dims[axis]
    return isinstance(size, int) and end >= size


_RULES: dict[str, Rule] = {
    "Cast": _cast,
    "CastLike": _cast_like,
    "Concat": _single,
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _flatten,
    "Identity": _always,
    "Max": _single,
    "Mean": _single,
    "Min": _single,
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _one_part,
    "Squeeze": _same_shape,
    "Sum": _single,
    "Tile": _tile,
    "Transpose": _transpose,
}


def _merge_transposes(node: ir.Node, scope: Scope) -> str:
    first = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if not (is_op(node, "Transpose") and first is not None and is_op(first, "Transpose")):
        return ""
    before, perm = ints_attr(first, "perm"), ints_attr(node, "perm")
    source = first.inputs[0]
    if source is None or has_reference(first) or bool(before) != bool(perm):
        return ""
    both = tuple(before[p] for p in perm) if before else ()  # without perm: twice reversed
    if not both or both == tuple(range(len(both))):
        if not forward(node.outputs[0], source):
            return ""
        remove_if_unused(node)
        remove_if_unused(first)
        return "undoes the Transpose before it, both removed"
    if only_user(first.outputs[0]) is not node:
        return ""
    node.attributes["perm"] = ir.AttrInt64s("perm", both)
    node.replace_input_with(0, source)
    remove_if_unused(first)
    return "merged with the Transpose before it"


def _plain_cast(node: ir.Node, scope: Scope) -> str:
    """CastLike to a type that is known: a Cast does not hold on to the tensor it is like."""
    if not is_op(node, "CastLike"):
        return ""
    dtype = scope.shapes.dtype(node.inputs[1])
    if dtype is None or scope.shapes.dtype(node.inputs[0]) is None:
        return ""
    node.op_type = "Cast"
    node.resize_inputs(1)
    node.attributes["to"] = ir.AttrInt64("to", int(dtype))
    return f"became a Cast to {dtype.name}"


_INT_BITS = {
    ir.DataType[f"{sign}INT{bits}"]: bits - (not sign)
    for sign in ("", "U")
    for bits in (8, 16, 32, 64)
}
# Bits of an integer that each float type holds exactly.
_FLOAT_BITS = {ir.DataType.FLOAT16: 11, ir.DataType.FLOAT: 24, ir.DataType.DOUBLE: 53}
_FLOATS_WITHIN = {
    ir.DataType.FLOAT16: (ir.DataType.FLOAT, ir.DataType.DOUBLE),
    ir.DataType.BFLOAT16: (ir.DataType.FLOAT, ir.DataType.DOUBLE),
    ir.DataType.FLOAT: (ir.DataType.DOUBLE,),
}


def holds_exactly(wide: ir.DataType, narrow: ir.DataType) -> bool:
    """Whether every number of type ``narrow`` is one of type ``wide``."""
    if wide == narrow:
        return True
    if narrow == ir.DataType.BOOL:
        return wide in _INT_BITS or wide in _FLOAT_BITS
    if narrow in _INT_BITS:
        signed_into_unsigned = narrow.name.startswith("I") and wide.name.startswith("U")
        room = _INT_BITS.get(wide, _FLOAT_BITS.get(wide, 0))
        return room >= _INT_BITS[narrow] and not signed_into_unsigned
    return wide in _FLOATS_WITHIN.get(narrow, ())


def _merge_casts(node: ir.Node, scope: Scope) -> str:
    """Cast(Cast(x)): the first can go when it loses nothing and the second does not round to int.

    What a float becomes as an integer when it does not fit depends on the type it comes from.
    """
    first = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if not (is_op(node, "Cast") and first is not None and is_op(first, "Cast")):
        return ""
    source = first.inputs[0]
    start = scope.shapes.dtype(source)
    middle, end = (ir.DataType(int_attr(n, "to", 0)) for n in (first, node))
    if source is None or start is None or has_reference(first) or not holds_exactly(middle, start):
        return ""
    if end == start:
        if not forward(node.outputs[0], source):
            return ""
        remove_if_unused(node)
        remove_if_unused(first)
        return "undoes the Cast before it, both removed"
    if only_user(first.outputs[0]) is not node or not _merges(start, end):
        return ""
    node.replace_input_with(0, source)
    remove_if_unused(first)
    return "merged with the Cast before it"


def _merges(start: ir.DataType, end: ir.DataType) -> bool:
    if start in _INT_BITS or start == ir.DataType.BOOL:
        return end in _INT_BITS or end in _FLOAT_BITS or end == ir.DataType.BOOL
    return end in _FLOAT_BITS
