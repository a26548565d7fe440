"""The pass ``infer_shapes``."""

from __future__ import annotations

import onnx_ir as ir

from effdl.graph.shapes import infer_into
from effdl.passes.base import Context, Pass


class InferShapes(Pass):
    """Write the inferred type and shape of every value into the model.

    What it does: runs shape inference, shape arithmetic and contrib operators included, and records
    what it finds for values that declare nothing or less. Declared shapes are never contradicted.

    When it helps: tools that read shapes from the file, such as viewers, compilers for accelerators
    and cost counters, find them there.

    When it does not: ONNX Runtime infers shapes itself when it loads a model. The file grows by about
    40 bytes per node.

    Example:
        passes: [simplify, infer_shapes]
    """

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of values that gained a type or shape."""
        changes = infer_into(model)
        if changes:
            ctx.note("values", changes)
            ctx.touch("model", f"{changes} values gained a shape")
        return changes
