"""What is known about small integer tensors that come from shapes, element by element.

``Shape(x)`` of a dynamic ``x`` is not constant, but its element for a static axis is. Following
single elements through Gather, Slice, Concat and the like finds the constants that are in there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from effdl.graph.edit import has_reference
from effdl.graph.shapes import Shapes
from effdl.graph.sizes import output_sizes
from effdl.graph.symbols import Derived, Element, Elements, Unknown, combine, never_negative
from effdl.graph.walk import MICROSOFT, int_attr, ints_attr
from effdl.graph.weights import Array, constant_tensor

_MOST = 64
_INTEGERS = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL}


class Facts:
    """Elements of the values of a graph and its subgraphs; visit the nodes in topological order.

    Args:
        shapes: what shape inference found.
        known: constants found by other means, looked up first.
    """

    def __init__(self, shapes: Shapes, known: Mapping[ir.Value, Array]) -> None:
        self._shapes = shapes
        self._known = known
        self._found: dict[ir.Value, Elements] = {}
        self._sizes: dict[ir.Value, tuple[Element, ...]] = {}

    def visit(self, node: ir.Node) -> None:
        """Follow what ``node`` makes, if it is one of the operators that are understood."""
        if node.domain == MICROSOFT:
            self._measure(node)
        if node.domain not in ("", "ai.onnx") or has_reference(node):
            return
        rule = _RULES.get(node.op_type)
        elements = rule(self, node) if rule is not None else None
        if elements is not None and len(elements.items) <= _MOST:
            self._found[node.outputs[0]] = elements
        self._measure(node)

    def _measure(self, node: ir.Node) -> None:
        """Work out the sizes of the first output where inference left some of them open."""
        output = node.outputs[0] if node.outputs else None
        if output is None or self._shapes.static(output) is not None:
            return
        sizes = output_sizes(node, self.dims, lambda at: self.input(node, at))
        before = self.dims(output)
        if sizes is None or (before is not None and len(before) != len(sizes)):
            return
        old = before or tuple(Unknown(output, at, True) for at in range(len(sizes)))
        self._sizes[output] = tuple(
            size if size is not None and self._is_open(was, output) else was
            for size, was in zip(sizes, old, strict=True)
        )

    def _is_open(self, size: Element, value: ir.Value) -> bool:
        return isinstance(size, Unknown) and size.value is value

    def of(self, value: ir.Value | None) -> Elements | None:
        """Return what is known of ``value``, None when it is no small integer tensor."""
        if value is None:
            return None
        if value in self._found:
            return self._found[value]
        array = self._known.get(value)
        tensor = constant_tensor(value) if array is None else None
        if tensor is not None and tensor.size <= _MOST and tensor.dtype in _INTEGERS:
            array = tensor.numpy()
        if array is None or array.ndim > 1 or array.size > _MOST or array.dtype.kind not in "ib":
            return None
        dtype = ir.DataType.from_numpy(array.dtype)
        return Elements(tuple(int(i) for i in array.ravel()), array.ndim == 0, dtype)

    def dims(self, value: ir.Value | None) -> tuple[Element, ...] | None:
        """Return the sizes of the axes of ``value``, None when its rank is not known."""
        if value is None:
            return None
        if value in self._sizes:
            return self._sizes[value]
        dims = self._shapes.of(value)
        if dims is None:
            return None
        names = self._shapes.symbols(value)
        return tuple(
            d
            if isinstance(d, int)
            else Unknown(value, i, True)
            if names[i] is None
            else Unknown(names[i] or "", 0, True)
            for i, d in enumerate(dims)
        )

    def found(self, value: ir.Value) -> Elements | None:
        """Return the elements that a visited node was seen to make, None for all other values."""
        return self._found.get(value)

    def input(self, node: ir.Node, index: int) -> Elements | None:
        """Return the elements of input ``index`` of ``node``."""
        return self.of(node.inputs[index]) if index < len(node.inputs) else None

    def ints(self, node: ir.Node, index: int, attribute: str) -> tuple[int, ...] | None:
        """Return integers given as an attribute in old opsets and as a constant input in new ones."""
        if attribute in node.attributes:
            return ints_attr(node, attribute)
        elements = self.input(node, index)
        array = elements.known() if elements is not None else None
        return None if array is None else tuple(int(i) for i in array.ravel())


Rule = Callable[[Facts, ir.Node], Elements | None]


def _shape(facts: Facts, node: ir.Node) -> Elements | None:
    dims = facts.dims(node.inputs[0])
    if dims is None:
        return None
    end = node.attributes.get("end")
    dims = dims[slice(int_attr(node, "start", 0), None if end is None else end.as_int())]
    return Elements(dims, False, ir.DataType.INT64)


def _size(facts: Facts, node: ir.Node) -> Elements | None:
    dims = facts.dims(node.inputs[0])
    if dims is None:
        return None
    count: Element = 1
    for d in dims:
        count = combine("Mul", count, d, ir.DataType.INT64)
    return Elements((count,), True, ir.DataType.INT64)


def _reduce_prod(facts: Facts, node: ir.Node) -> Elements | None:
    data = facts.input(node, 0)
    axes = facts.ints(node, 1, "axes") if len(node.inputs) > 1 or "axes" in node.attributes else ()
    if data is None or data.scalar or axes not in ((), (0,), (-1,)) or not data.items:
        return None
    if axes == () and int_attr(node, "noop_with_empty_axes", 0):
        return None
    count: Element = 1
    for item in data.items:
        count = combine("Mul", count, item, data.dtype)
    return Elements((count,), not int_attr(node, "keepdims", 1), data.dtype)


def _gather(facts: Facts, node: ir.Node) -> Elements | None:
    data, where = facts.input(node, 0), facts.input(node, 1)
    if data is None or where is None or data.scalar or int_attr(node, "axis", 0) not in (0, -1):
        return None
    at = [i for i in where.items if isinstance(i, int)]
    count = len(data.items)
    if len(at) < len(where.items) or any(not -count <= i < count for i in at):
        return None
    return Elements(tuple(data.items[i] for i in at), where.scalar, data.dtype)


def _slice(facts: Facts, node: ir.Node) -> Elements | None:
    data = facts.input(node, 0)
    starts, ends = facts.ints(node, 1, "starts"), facts.ints(node, 2, "ends")
    steps = facts.ints(node, 4, "steps") if len(node.inputs) > 4 and node.inputs[4] else (1,)
    if data is None or data.scalar or starts is None or ends is None or steps is None:
        return None
    if not len(starts) == len(ends) == len(steps) == 1 or steps[0] < 1:
        return None
    return Elements(data.items[starts[0] : ends[0] : steps[0]], False, data.dtype)


def _concat(facts: Facts, node: ir.Node) -> Elements | None:
    items: list[Element] = []
    dtype = ir.DataType.UNDEFINED
    for part in map(facts.of, node.inputs):
        if part is None or part.scalar:
            return None
        items += part.items
        dtype = part.dtype
    return Elements(tuple(items), False, dtype)


def _unsqueeze(facts: Facts, node: ir.Node) -> Elements | None:
    data, axes = facts.input(node, 0), facts.ints(node, 1, "axes")
    if data is None or not data.scalar or axes not in ((0,), (-1,)):
        return None
    return Elements(data.items, False, data.dtype)


def _squeeze(facts: Facts, node: ir.Node) -> Elements | None:
    data = facts.input(node, 0)
    if data is None or data.scalar or len(data.items) != 1:
        return None
    return Elements(data.items, True, data.dtype)


def _reshape(facts: Facts, node: ir.Node) -> Elements | None:
    data, goal = facts.input(node, 0), facts.ints(node, 1, "shape")
    if data is None or goal is None or len(goal) > 1 or 0 in goal:
        return None
    return Elements(data.items, not goal, data.dtype)


def _same(facts: Facts, node: ir.Node) -> Elements | None:
    return facts.input(node, 0)


def _cast(facts: Facts, node: ir.Node) -> Elements | None:
    data, goal = facts.input(node, 0), ir.DataType(int_attr(node, "to", 0))
    if data is None or goal not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    # A number beyond 2**31 would wrap in a cast to INT32; it is not followed any further.
    if any(isinstance(i, int) and not -(1 << 31) <= i < 1 << 31 for i in data.items):
        return None
    items = data.items
    if goal == ir.DataType.INT32:
        out = node.outputs[0]
        items = tuple(
            Unknown(out, at, False) if isinstance(i, Derived) else i for at, i in enumerate(items)
        )
    return Elements(items, data.scalar, goal)


def _rows(parts: list[Elements]) -> list[tuple[Element, ...]] | None:
    """Broadcast to one length, None where that does not work."""
    count = max(len(p.items) for p in parts)
    if any(len(p.items) not in (1, count) for p in parts):
        return None
    spread = [p.items * count if len(p.items) == 1 else p.items for p in parts]
    return list(zip(*spread, strict=False))


def _arithmetic(facts: Facts, node: ir.Node) -> Elements | None:
    a, b = facts.input(node, 0), facts.input(node, 1)
    rows = _rows([a, b]) if a is not None and b is not None else None
    if a is None or b is None or rows is None or a.dtype != b.dtype or a.dtype == ir.DataType.BOOL:
        return None
    items = tuple(combine(node.op_type, x, y, a.dtype) for x, y in rows)
    return Elements(items, a.scalar and b.scalar, a.dtype)


def _equal(facts: Facts, node: ir.Node) -> Elements | None:
    a, b = facts.input(node, 0), facts.input(node, 1)
    rows = _rows([a, b]) if a is not None and b is not None else None
    if a is None or b is None or rows is None:
        return None
    items: list[Element] = []
    for i, (x, y) in enumerate(rows):
        number, size = (x, y) if isinstance(x, int) else (y, x)
        if x == y:
            items.append(1)
        elif (isinstance(x, int) and isinstance(y, int)) or (
            isinstance(number, int) and number < 0 and never_negative(size)
        ):
            items.append(0)
        else:
            items.append(Unknown(node.outputs[0], i, False))
    return Elements(tuple(items), a.scalar and b.scalar, ir.DataType.BOOL)


def _where(facts: Facts, node: ir.Node) -> Elements | None:
    condition, yes, no = facts.input(node, 0), facts.input(node, 1), facts.input(node, 2)
    if condition is None or yes is None or no is None or yes.dtype != no.dtype:
        return None
    rows = _rows([condition, yes, no])
    if rows is None:
        return None
    items: list[Element] = []
    for i, (c, y, n) in enumerate(rows):
        if y == n:
            items.append(y)
        elif isinstance(c, int):
            items.append(y if c else n)
        else:
            items.append(Unknown(node.outputs[0], i, False))
    return Elements(tuple(items), condition.scalar and yes.scalar and no.scalar, yes.dtype)


def _constant_of_shape(facts: Facts, node: ir.Node) -> Elements | None:
    goal, value = facts.input(node, 0), node.attributes.get("value")
    tensor = value.as_tensor() if value is not None else None
    sizes = goal.known() if goal is not None and not goal.scalar else None
    if tensor is None or tensor.dtype not in _INTEGERS or sizes is None:
        return None
    if len(sizes) > 1 or any(not 0 <= s <= _MOST for s in sizes):
        return None
    count = int(sizes[0]) if len(sizes) else 1
    return Elements((int(tensor.numpy().ravel()[0]),) * count, not len(sizes), tensor.dtype)


_RULES: dict[str, Rule] = {
    "Add": _arithmetic,
    "Cast": _cast,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Div": _arithmetic,
    "Equal": _equal,
    "Gather": _gather,
    "Identity": _same,
    "Mul": _arithmetic,
    "ReduceProd": _reduce_prod,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _arithmetic,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}


def reshape_goal(dims: tuple[Element, ...] | None, elements: Elements) -> tuple[int, ...] | None:
    """Return a constant shape that reshapes (allowzero=0) as ``elements`` do, None if there is none.

    An element that is the size of the data's axis at its own place becomes 0: at run time a size of 0
    would mean the same. One other unknown becomes -1 where all the rest are positive numbers.

    Args:
        dims: sizes of the axes of the data, None where its rank is not known.
        elements: the shape that is asked for.
    """
    if 0 in elements.items:
        return None
    sizes = dims or ()
    own = [
        at < len(sizes) and i == sizes[at] and not isinstance(i, int)
        for at, i in enumerate(elements.items)
    ]
    others = [i for i, is_own in zip(elements.items, own, strict=True) if not is_own]
    numbers = [i for i in others if isinstance(i, int)]
    if len(others) - len(numbers) > 1:
        return None
    if len(others) > len(numbers) and (any(own) or any(i < 1 for i in numbers)):
        return None
    return tuple(
        0 if is_own else i if isinstance(i, int) else -1
        for i, is_own in zip(elements.items, own, strict=True)
    )
