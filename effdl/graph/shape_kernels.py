"""Shape arithmetic on small arrays in numpy: what ONNX Runtime computes, without a session.

Arithmetic on integers and booleans only, where numpy and ONNX Runtime agree to the bit; what only
moves elements on floats as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto
from onnx.numpy_helper import to_array

Array = npt.NDArray[Any]
Attributes = Mapping[str, Any]
Kernel = Callable[[Sequence[Array], Attributes], Array]
MOST = 1024
"""Elements of an input or of the result."""
_CASTS = {6: np.int32, 7: np.int64, 9: np.bool_}


def compute(op_type: str, inputs: Sequence[Array | None], attributes: Attributes) -> Array | None:
    """Return the one output of a node on small integers or booleans; None: leave it to others.

    Args:
        op_type: of the default domain.
        inputs: an array per input, None where it is absent.
        attributes: Python values by name, integers and lists of them only.
    """
    kernel = _KERNELS.get(op_type)
    if kernel is None:
        return None
    given = [a for a in inputs if a is not None]
    if len(given) != len(inputs) and op_type != "Slice":
        return None
    kinds = "ibuf" if op_type in _MOVES else "ib"
    if not given or any(a.size > MOST or a.dtype.kind not in kinds for a in given):
        return None
    try:
        result = kernel(inputs, attributes)  # type: ignore[arg-type]
    except (IndexError, ValueError, KeyError, OverflowError, TypeError):
        return None
    return result if result.size <= MOST else None


def _axes(inputs: Sequence[Array], attributes: Attributes) -> tuple[int, ...] | None:
    if "axes" in attributes:
        return tuple(attributes["axes"])
    return tuple(int(a) for a in inputs[1].ravel()) if len(inputs) > 1 else None


def _unsqueeze(inputs: Sequence[Array], attributes: Attributes) -> Array:
    axes = _axes(inputs, attributes)
    if axes is None:
        raise KeyError("axes")
    return np.expand_dims(inputs[0], axes)


def _squeeze(inputs: Sequence[Array], attributes: Attributes) -> Array:
    return np.squeeze(inputs[0], _axes(inputs, attributes))


def _gather(inputs: Sequence[Array], attributes: Attributes) -> Array:
    data, index = inputs
    axis = attributes.get("axis", 0)
    size = data.shape[axis]
    if index.dtype.kind != "i" or np.any(index < -size) or np.any(index >= size):
        raise IndexError
    return np.asarray(np.take(data, index, axis))


def _concat(inputs: Sequence[Array], attributes: Attributes) -> Array:
    if len({a.dtype for a in inputs}) > 1:
        raise TypeError
    return np.concatenate(inputs, attributes["axis"])


def _slice(inputs: Sequence[Array], attributes: Attributes) -> Array:
    if len(inputs) < 3 or any(a is None for a in inputs[:3]):
        raise KeyError  # the old form, with attributes
    data, *rest = inputs
    starts, ends = ([int(i) for i in a.ravel()] for a in rest[:2])
    given = len(rest) > 2 and rest[2] is not None
    axes = [int(i) for i in rest[2].ravel()] if given else list(range(len(starts)))
    stepped = len(rest) > 3 and rest[3] is not None
    steps = [int(i) for i in rest[3].ravel()] if stepped else [1] * len(starts)
    cuts = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        cuts[axis] = (
            slice(start, end, step) if step > 0 else _down(data.shape[axis], start, end, step)
        )
    return np.asarray(data[tuple(cuts)])


def _down(size: int, start: int, end: int, step: int) -> slice:
    """Return the cut of a negative step, whose ends Python reads otherwise than ONNX.

    An end beyond the last element is left to others: ONNX Runtime takes a very large one for -1.
    """
    if step == 0 or size == 0 or end > size:
        raise ValueError
    first = min(start + size if start < 0 else start, size - 1)
    last = max(end + size if end < 0 else end, -1)
    return slice(max(first, 0), None if last < 0 else last, step)


def _reshape(inputs: Sequence[Array], attributes: Attributes) -> Array:
    data, goal = inputs
    sizes = [int(s) for s in goal]
    if not attributes.get("allowzero", 0):
        sizes = [data.shape[i] if s == 0 else s for i, s in enumerate(sizes)]
    return data.reshape(sizes)


def _cast(inputs: Sequence[Array], attributes: Attributes) -> Array:
    return np.asarray(inputs[0].astype(_CASTS[attributes["to"]]))


def _identity(inputs: Sequence[Array], attributes: Attributes) -> Array:
    return inputs[0]


def _transpose(inputs: Sequence[Array], attributes: Attributes) -> Array:
    return np.transpose(inputs[0], attributes.get("perm"))


def _filled(inputs: Sequence[Array], attributes: Attributes) -> Array:
    sizes = [int(s) for s in inputs[0]]
    value = attributes.get("value")
    if min(sizes, default=0) < 0 or math.prod(sizes) > MOST:
        raise ValueError
    if value is None:
        return np.zeros(sizes, np.float32)
    one = to_array(value) if isinstance(value, TensorProto) else value.numpy()
    if one.dtype.kind not in "ibuf":
        raise TypeError
    return np.full(sizes, one.reshape(-1)[0])


def _expand(inputs: Sequence[Array], attributes: Attributes) -> Array:
    data, goal = inputs
    shape = np.broadcast_shapes(data.shape, tuple(int(s) for s in goal))
    if math.prod(shape) > MOST:
        raise ValueError
    return np.array(np.broadcast_to(data, shape))


def _logical(function: Callable[..., Array]) -> Kernel:
    def run(inputs: Sequence[Array], attributes: Attributes) -> Array:
        a, b = inputs
        if attributes or a.dtype.kind != "b" or b.dtype.kind != "b":
            raise TypeError
        return np.asarray(function(a, b))

    return run


def _binary(function: Callable[..., Array]) -> Kernel:
    def run(inputs: Sequence[Array], attributes: Attributes) -> Array:
        a, b = inputs
        if attributes or a.dtype != b.dtype or a.dtype.kind == "b":
            raise TypeError
        return np.asarray(function(a, b))

    return run


def _divide(a: Array, b: Array) -> Array:
    if np.any(b == 0) or np.any((a == np.iinfo(a.dtype).min) & (b == -1)):
        raise ValueError
    return np.asarray(np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)), a.dtype)


def _where(inputs: Sequence[Array], attributes: Attributes) -> Array:
    condition, a, b = inputs
    if condition.dtype.kind != "b" or a.dtype != b.dtype:
        raise TypeError
    return np.asarray(np.where(condition, a, b))


def _not(inputs: Sequence[Array], attributes: Attributes) -> Array:
    if inputs[0].dtype.kind != "b":
        raise TypeError
    return np.asarray(~inputs[0])


_MOVES = frozenset(
    [
        "Concat",
        "Expand",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    ]
)
_KERNELS: dict[str, Kernel] = {
    "Add": _binary(np.add),
    "And": _logical(np.logical_and),
    "Cast": _cast,
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "Div": _binary(_divide),
    "Equal": _binary(np.equal),
    "Expand": _expand,
    "Gather": _gather,
    "Greater": _binary(np.greater),
    "GreaterOrEqual": _binary(np.greater_equal),
    "Identity": _identity,
    "Less": _binary(np.less),
    "LessOrEqual": _binary(np.less_equal),
    "Mul": _binary(np.multiply),
    "Not": _not,
    "Or": _logical(np.logical_or),
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _binary(np.subtract),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
