"""The pass ``convert_opset``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import onnx_ir as ir
from pydantic import Field, model_validator

from effdl.graph.versions import convert_opset, newest_opset
from effdl.graph.walk import opset
from effdl.passes.base import Context, Pass

_DEFAULT = 21


class ConvertOpset(Pass):
    """Convert the model to another version of the ONNX operator set.

    What it does: rewrites the operators that changed between the model's opset and the wanted one,
    in subgraphs and functions too, and raises or lowers the opset import. ``at_least`` leaves newer
    models alone, ``to`` goes exactly there. Without options it is ``at_least: 21``: the oldest opset
    with 4-bit integers and blockwise quantization, and known to every ONNX Runtime since 1.18.
    Operators of other domains stay as they are.

    When it helps: other passes need newer operators: LayerNormalization is there from opset 17, Gelu
    from opset 20. A lower opset helps where a runtime or compiler is old.

    When it does not: the conversion itself makes nothing faster. Going down fails where an operator
    did not exist yet; the model is then left as it was and the operator named.

    Example:
        passes: [{convert_opset: {at_least: 17}}]
    """

    not_after: ClassVar[Mapping[str, str]] = {}

    to: int | None = Field(default=None, ge=7, le=newest_opset())
    """Exactly this default-domain opset, up or down."""
    at_least: int | None = Field(default=None, ge=7, le=newest_opset())
    """Raise the default-domain opset to this one when it is lower."""

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        if self.to is not None and self.at_least is not None:
            raise ValueError("give 'to' or 'at_least', not both")
        return self

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of nodes whose operator changed, 1 at least when the opset did.

        Raises:
            ModelError: an operator cannot be converted.
        """
        source = opset(model)
        if not source:
            ctx.skip("model", "it imports no default operator set")
            return 0
        version = self.to if self.to is not None else max(source, self.at_least or _DEFAULT)
        if version == source:
            return 0
        changes = convert_opset(model, version)
        ctx.note("opset_before", source)
        ctx.note("opset", version)
        ctx.touch("model", f"opset {source} became {version}")
        return changes
