"""Sizes of the axes of what a node makes, dynamic ones told by where they come from.

ONNX's inference gives up where a size has to be worked out: a Reshape with -1, a Slice up to the length
of the sequence. What follows from the sizes of the inputs alone is found here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import onnx_ir as ir

from effdl.graph.symbols import Derived, Element, Elements, Unknown, combine, never_negative
from effdl.graph.walk import MICROSOFT, int_attr, ints_attr

Sizes = tuple[Element | None, ...]
Dims = Callable[[ir.Value | None], tuple[Element, ...] | None]
Input = Callable[[int], Elements | None]
Rule = Callable[[ir.Node, Dims, Input], Sizes | None]
_INT64 = ir.DataType.INT64
_FAR = (1 << 31) - 1
_AS_FIRST = """
Abs Cast CastLike Ceil Clip Cos CumSum Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity IsInf
IsNaN LayerNormalization LeakyRelu Log LogSoftmax Neg Not PRelu Reciprocal Relu RMSNormalization Round
Sigmoid Sign Sin Softmax Softplus Sqrt Tanh Trilu BatchNormalization InstanceNormalization
GroupNormalization
"""
_CONTRIB_AS_FIRST = """
BiasGelu FastGelu Gelu QuickGelu SkipLayerNormalization SkipSimplifiedLayerNormalization
"""
_BROADCAST = """
Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mod Mul Or Pow Sub Sum Where Xor
"""


def output_sizes(node: ir.Node, dims: Dims, elements: Input) -> Sizes | None:
    """Return the sizes of the first output of ``node``, None for those that cannot be told.

    Args:
        node: a node of the default domain or of com.microsoft.
        dims: gives the sizes of a value, None when its rank is not known.
        elements: gives what is known of the integers of an input by its position.
    """
    rules = _CONTRIB if node.domain == MICROSOFT else _RULES
    rule = rules.get(node.op_type)
    return rule(node, dims, elements) if rule is not None and node.inputs else None


def _as_first(node: ir.Node, dims: Dims, elements: Input) -> Sizes | None:
    return dims(node.inputs[0])


def _broadcast_node(node: ir.Node, dims: Dims, elements: Input) -> Sizes | None:
    if "broadcast" in node.attributes or "axis" in node.attributes:
        return dims(node.inputs[0])  # before opset 7 the first input had the size of the result
    sizes: Sizes | None = ()
    for value in node.inputs:
        sizes = _broadcast(sizes, dims(value))
    return sizes


def _broadcast(a: Sizes | None, b: Sizes | None) -> Sizes | None:
    if a is None or b is None:
        return None
    count = max(len(a), len(b))
    a, b = (1,) * (count - len(a)) + a, (1,) * (count - len(b)) + b
    return tuple(_meet(x, y) for x, y in zip(a, b, strict=True))


def _meet(x: Element | None, y: Element | None) -> Element | None:
    if y in (x, 1):
        return x
    if x == 1:
        return y
    for one, other in ((x, y), (y, x)):
        if isinstance(one, int) and one > 1:
            return one  # the other is the same number or 1
        # A part of at most c >= 1 elements of an axis is as long as the axis, or they do not go together.
        if isinstance(one, Derived) and one.op == "Min" and other == one.x:
            return other
    return None


def _matmul(node: ir.Node, dims: Dims, elements: Input) -> Sizes | None:
    a, b = dims(node.inputs[0]), dims(node.inputs[1])
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return None
    batch = _broadcast(a[:-2], b[:-2])
    return None if batch is None else (*batch, a[-2], b[-1])


def _transpose(node: ir.Node, dims: Dims, elements: Input) -> Sizes | None:
    sizes = dims(node.inputs[0])
    if sizes is None:
        return None
    perm = ints_attr(node, "perm") or tuple(range(len(sizes)))[::-1]
    right = sorted(perm) == list(
        range(len(sizes))
    )  # exporters have written axes that are not there
    return tuple(sizes[p] for p in perm) if right else None


def _reshape(node: ir.Node, dims: Dims, elements: Input) -> Sizes | None:
    goal, sizes = elements(1), dims(node.inputs[0])
    if goal is None or goal.scalar:
        return None
    copies = not int_attr(node, "allowzero", 0)
    made: list[Element | None] = []
    open_at = []
    for at, item in enumerate(goal.items):
        if item == 0 and copies:
            made.append(sizes[at] if sizes is not None and at < len(sizes) else None)
        elif item == -1:
            open_at.append(at)
            made.append(None)
        else:
            # A number that could be -1 at run time says nothing.
            made.append(item if never_negative(item) else None)
    rest = [m for at, m in enumerate(made) if at not in open_at]
    if len(open_at) == 1 and sizes is not None and all(m is not None for m in rest):
        made[open_at[0]] = _quotient(sizes, [m for m in rest if m is not None])
    return tuple(made)


def _quotient(product: tuple[Element, ...], divisors: list[Element]) -> Element | None:
    """Divide sizes by sizes; None where it does not come out even."""
    if 0 in product or 0 in divisors:
        return None
    above, below = Counter(product), Counter(divisors)
    common = above & below
    above, below = above - common, below - common
    number = 1
    left: list[Element] = []
    for item in above.elements():
        if isinstance(item, int):
            number *= item
        else:
            left.append(item)
    for item in below.elements():
        if not isinstance(item, int) or item < 1 or number % item:
            return None
        number //= item
    result: Element = number
    for item in sorted(left, key=hash):
        result = combine("Mul", result, item, _INT64)
    return result


def _unsqueeze(node: ir.Node, dims: Dims, elements: Input) -> Sizes | None:
    sizes, axes = dims(node.inputs[0]), _axes(node, elements)
    if sizes is None or axes is None:
        return None
    count = len(sizes) + len(axes)
    at = {a % count for a in axes}
    rest = iter(sizes)
    return tuple(1 if k in at else next(rest, None) for k in range(count))


def _squeeze(node: ir.Node, dims: Dims, elements: Input) -> Sizes | None:
    sizes, axes = dims(node.inputs[0]), _axes(node, elements)
    if not sizes or not axes:
        return None
    at = {a % len(sizes) for a in axes}
    return tuple(s for k, s in enumerate(sizes) if k not in at)


def _axes(node: ir.Node, elements: Input) -> tuple[int, ...] | None:
    if "axes" in node.attributes:
        return ints_attr(node, "axes")
    given = elements(1) if len(node.inputs) > 1 else None
    if given is None or not all(isinstance(i, int) for i in given.items):
        return None
    return tuple(i for i in given.items if isinstance(i, int))


def _gather(node: ir.Node, dims: Dims, elements: Input) -> Sizes | None:
    data, index = dims(node.inputs[0]), dims(node.inputs[1])
    if not data or index is None:
        return None
    axis = int_attr(node, "axis", 0) % len(data)
    return (*data[:axis], *index, *data[axis + 1 :])


def _concat(node: ir.Node, dims: Dims, elements: Input) -> Sizes | None:
    parts = [dims(v) for v in node.inputs]
    if any(p is None or len(p) != len(parts[0] or ()) for p in parts) or not parts[0]:
        return None
    known = [p for p in parts if p is not None]
    axis = int_attr(node, "axis", 0) % len(known[0])
    made: list[Element | None] = []
    for k, column in enumerate(zip(*known, strict=True)):
        if k == axis:
            total: Element = 0
            for item in column:
                total = combine("Add", total, item, _INT64)
            made.append(total)
        else:
            numbers = [c for c in column if isinstance(c, int)]
            made.append(numbers[0] if numbers else column[0])
    return tuple(made)


def _expand(node: ir.Node, dims: Dims, elements: Input) -> Sizes | None:
    goal = elements(1)
    if goal is None or goal.scalar or not all(map(never_negative, goal.items)):
        return None
    return _broadcast(dims(node.inputs[0]), goal.items)


def _constant_of_shape(node: ir.Node, dims: Dims, elements: Input) -> Sizes | None:
    goal = elements(0)
    return None if goal is None or goal.scalar else goal.items


def _slice(node: ir.Node, dims: Dims, elements: Input) -> Sizes | None:
    sizes = dims(node.inputs[0])
    if sizes is None or len(node.inputs) < 3:
        return None
    columns = [
        elements(k) if k < len(node.inputs) and node.inputs[k] is not None else None
        for k in range(5)
    ]
    starts, ends, axes, steps = columns[1:]
    unclear = [
        k for k in range(3, len(node.inputs)) if node.inputs[k] is not None and columns[k] is None
    ]
    if starts is None or ends is None or unclear:
        return None
    made: list[Element | None] = list(sizes)
    places = axes.items if axes is not None else tuple(range(len(starts.items)))
    strides = steps.items if steps is not None else (1,) * len(places)
    if not len(places) == len(starts.items) == len(ends.items) == len(strides):
        return None
    for place, start, end, step in zip(places, starts.items, ends.items, strides, strict=True):
        if not isinstance(place, int):
            return None
        plain = start == 0 and step == 1
        made[place] = _head(sizes[place], end) if plain else None
    return tuple(made)


def _head(size: Element, end: Element) -> Element | None:
    """Return how many elements ``[:end]`` takes of an axis of ``size`` elements."""
    if size == end or (isinstance(end, int) and end >= _FAR):
        return size
    if isinstance(size, int) and isinstance(end, int):
        return min(size, end) if end >= 0 else max(size + end, 0)
    if isinstance(size, int) and size > 0 and isinstance(end, Unknown) and end.size:
        return Derived("Min", end, size, _INT64)
    return None


def _gemm(node: ir.Node, dims: Dims, elements: Input) -> Sizes | None:
    a, b = dims(node.inputs[0]), dims(node.inputs[1])
    if a is None or b is None or len(a) != 2 or len(b) != 2:
        return None
    return a[int_attr(node, "transA", 0)], b[1 - int_attr(node, "transB", 0)]


def _conv(node: ir.Node, dims: Dims, elements: Input) -> Sizes | None:
    data, weight = dims(node.inputs[0]), dims(node.inputs[1])
    if not data or not weight:
        return None
    return (data[0], weight[0], *(None for _ in data[2:]))


def _attention(node: ir.Node, dims: Dims, elements: Input) -> Sizes | None:
    """Batch and length are those of what asks; the last axis is left to shape inference."""
    data = dims(node.inputs[0])
    return (data[0], data[1], None) if data is not None and len(data) == 3 else None


_RULES: dict[str, Rule] = {
    **dict.fromkeys(_AS_FIRST.split(), _as_first),
    **dict.fromkeys(_BROADCAST.split(), _broadcast_node),
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "Expand": _expand,
    "Gather": _gather,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
_CONTRIB: dict[str, Rule] = {
    **dict.fromkeys(_CONTRIB_AS_FIRST.split(), _as_first),
    "Attention": _attention,
    "MultiHeadAttention": _attention,
}
