"""Operators that an affine map can be moved across, and what it is on their other side."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effdl.graph.shapes import Shapes
from effdl.graph.walk import int_attr, ints_attr, is_op, str_attr
from effdl.graph.weights import constant
from effdl.passes.fold._affine import Affine, Declined, Floats
from effdl.solve.regroup import regroup

_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_POSITIVE = ("Relu", "LeakyRelu", "PRelu")
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Upsample", "Resize")
CARRIERS = ("Identity", "Transpose", *_VIEWS, *_POSITIVE, *_POOLS, "DepthToSpace", "ReduceMean")


def carries(node: ir.Node) -> bool:
    """Whether a map may be moved across ``node``, if it is of the right kind."""
    return is_op(node, *CARRIERS) and not any(o.name for o in node.outputs[1:] if o.uses())


def upwards(node: ir.Node, affine: Affine, shapes: Shapes) -> Affine:
    """Return the map of the input of ``node`` that does what ``affine`` does to its output.

    Raises:
        Declined: there is none.
    """
    return _across(node, affine, shapes, up=True)


def downwards(node: ir.Node, affine: Affine, shapes: Shapes) -> Affine:
    """Return the map of the output of ``node`` that does what ``affine`` does to its input.

    Raises:
        Declined: there is none.
    """
    return _across(node, affine, shapes, up=False)


def _across(node: ir.Node, affine: Affine, shapes: Shapes, *, up: bool) -> Affine:
    here, there = node.inputs[0], node.outputs[0]
    if up:
        here, there = there, here
    assert here is not None
    assert there is not None
    dims = shapes.of(here)
    map_ = affine.full(None if dims is None else len(dims))
    if is_op(node, "Identity"):
        return map_
    if is_op(node, *_POSITIVE):
        if map_.shifts or not (map_.scale > 0).all():
            raise Declined(f"it is not a positive scale, {_label(node)} stands between")
        return map_
    if is_op(node, *_POOLS):
        return _across_pool(node, map_, shapes)
    moved = [_moved(node, a, shapes, here, there, up) for a in (map_.scale, map_.shift)]
    return Affine(moved[0], moved[1])


def _moved(
    node: ir.Node, array: Floats, shapes: Shapes, here: ir.Value, there: ir.Value, up: bool
) -> Floats:
    if array.ndim == 0:
        return array
    if is_op(node, "Transpose"):
        order = ints_attr(node, "perm") or tuple(reversed(range(array.ndim)))
        return np.transpose(array, np.argsort(order) if up else order)
    if is_op(node, "DepthToSpace"):
        return _depth(node, array, up)
    source, target = shapes.of(here), shapes.of(there)
    if is_op(node, "ReduceMean"):
        return _mean(node, array, up)
    if source is None or target is None:
        raise Declined(f"the shapes of {_label(node)} are not known")
    if is_op(node, "Reshape"):
        source, target = _kept(node, source, target, up)
    result = regroup(array, source, target)
    if result is None:
        raise Declined(f"its constant does not follow {_label(node)}")
    return result if result.size > 1 else result.reshape(())


def _kept(
    node: ir.Node,
    source: tuple[int | str | None, ...],
    target: tuple[int | str | None, ...],
    up: bool,
) -> tuple[tuple[int | str | None, ...], tuple[int | str | None, ...]]:
    """Give the dimensions that a Reshape copies (0 in its goal) a common name."""
    goal = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if goal is None or int_attr(node, "allowzero", 0):
        return source, target
    a, b = list(source), list(target)
    for k, d in enumerate(goal.ravel()):
        if int(d) == 0 and k < min(len(a), len(b)):
            same = a[k] if isinstance(a[k], int) else b[k] if isinstance(b[k], int) else f"kept {k}"
            a[k] = b[k] = same
    return tuple(a), tuple(b)


def _mean(node: ir.Node, array: Floats, up: bool) -> Floats:
    """A mean over axes along which the map is the same."""
    given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = ints_attr(node, "axes") if given is None else tuple(int(a) for a in given.ravel())
    keep = int_attr(node, "keepdims", 1)
    rank = array.ndim + (0 if keep or not up else len(axes))
    axes = tuple(a % rank for a in axes)
    if up and not keep:
        array = np.expand_dims(array, axes)
    if not axes or any(array.shape[a] != 1 for a in axes):
        raise Declined(f"it differs along what {_label(node)} averages")
    return array if up or keep else array.squeeze(axes)


def _depth(node: ir.Node, array: Floats, up: bool) -> Floats:
    size = int_attr(node, "blocksize", 1) ** 2
    if not up or any(n != 1 for i, n in enumerate(array.shape) if i != 1):
        raise Declined(f"its constant does not follow {_label(node)}")
    if str_attr(node, "mode", "DCR") == "CRD":
        return np.repeat(array, size, axis=1)
    return np.tile(array, (1, size, 1, 1))


def _across_pool(node: ir.Node, map_: Affine, shapes: Shapes) -> Affine:
    """A pool or a resize mixes positions, so the map has to be the same at all of them."""
    for array in (map_.scale, map_.shift):
        if array.ndim and any(n != 1 for i, n in enumerate(array.shape) if i != 1):
            raise Declined(f"it differs by position, {_label(node)} stands between")
    if is_op(node, "MaxPool", "GlobalMaxPool"):
        if not (map_.scale > 0).all():
            raise Declined(f"its scale is not positive, {_label(node)} stands between")
    elif is_op(node, "AveragePool"):
        pads = any(ints_attr(node, "pads")) or str_attr(node, "auto_pad", "NOTSET") not in (
            "NOTSET",
            "VALID",
        )
        if map_.shifts and (pads or int_attr(node, "ceil_mode", 0)):
            raise Declined(f"it shifts, {_label(node)} pads in between")
    elif is_op(node, "Upsample", "Resize"):
        a, b = shapes.of(node.inputs[0]), shapes.of(node.outputs[0])
        mode = str_attr(node, "coordinate_transformation_mode", "half_pixel")
        same = (
            a is not None
            and b is not None
            and len(a) > 1
            and isinstance(a[1], int)
            and a[1] == b[1]
        )
        nearest = str_attr(node, "mode", "nearest") == "nearest" and mode != "tf_crop_and_resize"
        if not nearest or (not same and map_.scale.size + map_.shift.size > 2):
            raise Declined(f"{_label(node)} stands between")
    return map_


def _label(node: ir.Node) -> str:
    return f"{node.op_type} '{node.name}'"
