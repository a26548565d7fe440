"""The pass ``set_shapes``."""

from __future__ import annotations

import json
from typing import Annotated, ClassVar

import onnx_ir as ir
from pydantic import Field

from effdl.errors import UsageError
from effdl.graph.dims import Dims, check_dims, dims_of, dynamic_dims
from effdl.graph.io import METADATA_PREFIX
from effdl.graph.shapes import infer
from effdl.graph.walk import all_graphs
from effdl.passes.base import Context, Pass

_RECORD = f"{METADATA_PREFIX}set_shapes"


class SetShapes(Pass):
    """Pin dynamic dimensions of the inputs to fixed sizes.

    What it does: gives dimensions a size, by their name or as ``input:axis``, in the inputs and
    wherever the name is declared, and works out what follows for the outputs. After that the model
    takes only inputs of these sizes.

    When it helps: compilers and accelerators that need static shapes, and ``simplify``, which can then
    compute the shape arithmetic away. ONNX Runtime plans memory better with fixed shapes.

    When it does not: a model that must take several batch sizes or lengths.

    Example:
        passes: [{set_shapes: {dims: {batch: 1, "image:2": 224}}}]
    """

    keeps_interface: ClassVar[bool] = False

    dims: dict[str, Annotated[int, Field(ge=1, strict=True)]] = Field(min_length=1)
    """Size by dimension: its name, or the name of an input and the axis, as in "image:2"."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of values whose declared shape changed.

        Raises:
            UsageError: a dimension that the model does not have, or that is fixed to another size.
        """
        open_dims = {k: v for k, v in self.dims.items() if not _is_pinned(model, k, v)}
        pinned = check_dims(model, open_dims)
        if not pinned:
            return 0
        shapes = infer(model, pinned)
        changes = 0
        for value in _values(model):
            before = dims_of(value.shape) or ()
            after = _after(value, before, shapes.of(value), pinned)
            if after != before:
                value.shape = ir.Shape(after)
                changes += 1
        record = _record(model) | pinned
        model.metadata_props[_RECORD] = json.dumps(record, sort_keys=True)
        for name, size in pinned.items():
            ctx.touch(name, f"pinned to {size}")
        ctx.note("values", changes)
        return changes

    def candidates(self, model: ir.Model, ctx: Context) -> list[str] | None:
        """Return the dimensions that will be pinned."""
        return sorted(set(self.dims) & set(dynamic_dims(model)))


def _is_pinned(model: ir.Model, name: str, size: int) -> bool:
    """Whether an earlier run pinned ``name`` to ``size``, or the axis it names has that size.

    Raises:
        UsageError: an earlier run pinned it to another size.
    """
    done = _record(model).get(name)
    if done is not None and done != size:
        raise UsageError(f"dimension '{name}' is already pinned to {done}, not {size}")
    if done is not None:
        return True
    for value in model.graph.inputs:
        for axis, d in enumerate(dims_of(value.shape) or ()):
            if name == f"{value.name}:{axis}" and d == size:
                return True
    return False


def _record(model: ir.Model) -> dict[str, int]:
    """Return the dimensions pinned so far: their names are no longer in any shape."""
    pinned: dict[str, int] = json.loads(model.metadata_props.get(_RECORD, "{}"))
    return pinned


def _values(model: ir.Model) -> list[ir.Value]:
    values: dict[ir.Value, None] = {}
    for graph in all_graphs(model):
        values.update(dict.fromkeys((*graph.inputs, *graph.outputs)))
        for node in graph:
            values.update(dict.fromkeys(node.outputs))
    return [v for v in values if v.shape is not None and not v.is_initializer()]


def _after(value: ir.Value, before: Dims, found: Dims | None, pinned: dict[str, int]) -> Dims:
    """Return the shape of ``value`` with what is pinned and what follows from it."""
    inferred = found if found is not None and len(found) == len(before) else before
    shape: list[int | str | None] = []
    for axis, (old, new) in enumerate(zip(before, inferred, strict=True)):
        name = old or f"{value.name}:{axis}"
        if isinstance(old, int):
            shape.append(old)
        elif isinstance(new, int):
            shape.append(new)
        else:
            shape.append(pinned.get(str(name), old) if old or value.is_graph_input() else old)
    return tuple(shape)
