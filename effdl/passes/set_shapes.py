"""The pass ``set_shapes``."""

from __future__ import annotations

from typing import Annotated, ClassVar

import onnx_ir as ir
from pydantic import Field

from effdl.graph.dims import check_dims, dims_of, dynamic_dims
from effdl.graph.shapes import infer
from effdl.passes.base import Context, Pass


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
            before = dims_of(value.shape)
            after = _after(model, value, before, shapes, pinned)
            if after is not None and after != before:
                value.shape = ir.Shape(after)
                changes += 1
        for name, size in pinned.items():
            ctx.touch(name, f"pinned to {size}")
        ctx.note("values", changes)
        return changes

    def candidates(self, model: ir.Model, ctx: Context) -> list[str] | None:
        """Return the dimensions that will be pinned."""
        return sorted(set(self.dims) & set(dynamic_dims(model)))
