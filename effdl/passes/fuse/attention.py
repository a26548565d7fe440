"""The pass ``fuse_attention``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from effdl.graph.clean import clean
from effdl.graph.edit import forward, roots
from effdl.graph.insert import Builder
from effdl.graph.match import Mismatch, attempt, label, need
from effdl.graph.probes import Probes, probe
from effdl.graph.walk import all_nodes, is_op
from effdl.graph.weights import Names, with_initial_values
from effdl.passes.base import Context, NodePass
from effdl.passes.fuse._attention_bias import Biases, ways
from effdl.passes.fuse._attention_forms import CONTRIB, Writer
from effdl.passes.fuse._attention_match import (
    Attention,
    is_candidate,
    match_attention,
)
from effdl.passes.fuse._attention_standard import match_standard

Form = Literal["auto", "attention", "mha", "onnx"]


class FuseAttention(NodePass):
    """Replace the dozen nodes of an attention by one that keeps the scores in the cache.

    What it does: finds softmax(scale · Q K^T + bias) V around each Softmax, in the forms of BERT, ViT,
    CLIP, Swin, T5, GPT and Whisper, as TorchScript, the dynamo exporter and TensorFlow write them:
    scale on Q, on K, on both or on the scores; masks that are added or chosen by Where, several of
    them, position biases, windows; heads split and merged by any chain of Reshape, Transpose, Split
    and Slice, which is followed with numbers and not by pattern. The form is Attention of
    com.microsoft (weights of Q, K and V in one matrix), MultiHeadAttention of com.microsoft (biases
    inside), or the standard Attention of opset 23. Rows that are masked altogether keep what they give.

    When it helps: transformers on a CPU, most with two threads or more and with exports that guard
    the softmax against NaN or transpose K twice. With `form: auto` every form is measured on the
    target and the fastest is kept, or none.

    When it does not: the products with the weights take 80 to 90 % of the time of an encoder; those
    stay. Scores or weights that are also outputs, masks of a moderate number such as -10000 chosen by
    Where, and scores that are the sum of two products are left alone. `effdl explain
    fuse_attention MODEL` says why.

    Example:
        passes: [simplify, {fuse_attention: {form: mha}}]
    """

    claims: ClassVar[frozenset[str]] = frozenset({"latency"})
    min_opset: ClassVar[int] = 11

    form: Form = "auto"
    """The node to make: attention (where Q, K and V have one input, else mha), mha, onnx, or the fastest."""

    def claimed(self) -> frozenset[str]:
        """Return what is promised: speed, unless a form is asked for."""
        return self.claims if self.form == "auto" else frozenset()

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of attentions fused."""
        anchors = [n for n in all_nodes(model) if is_candidate(n) and self.selected(n)]
        if not anchors:
            return 0
        defaults = [v.name for v in with_initial_values(model.graph).values() if _counts(v)]
        if defaults:
            for node in anchors:
                ctx.skip(node, f"a caller may feed '{defaults[0]}', which shapes may depend on")
            return 0
        shapes = probe(model)
        if all(shapes.of(n.inputs[0]) is None for n in anchors):
            shapes = probe(model, alike=True)
        names, done = Names(model), 0
        for root, imports, is_function in roots(model):
            inside = [n for n in anchors if n.graph is root]
            if is_function:
                for node in inside:
                    ctx.skip(node, "it is inside a function of the model")
                continue
            build = Builder(root, names, imports.get("", imports.get("ai.onnx", 0)))
            writer = Writer(build, Biases(build, shapes))
            done += sum(self._fuse(node, shapes, writer, ctx) for node in inside)
        outermost = {root for root, _, _ in roots(model)}
        for node in anchors:
            if node.graph is not None and node.graph not in outermost:
                ctx.skip(node, "it is inside the body of an If, Loop or Scan")
        if done:
            if self.form != "onnx":
                model.opset_imports.setdefault(CONTRIB, 1)
            clean(model)
        return done

    def variants(self) -> Sequence[FuseAttention]:
        """Return the forms that are worth measuring."""
        if self.form != "auto":
            return (self,)
        return tuple(self.model_copy(update={"form": f}) for f in ("attention", "mha", "onnx"))

    def _fuse(self, node: ir.Node, shapes: Probes, writer: Writer, ctx: Context) -> int:
        found = attempt(_match, node, shapes, writer.build.opset)
        if isinstance(found, str):
            ctx.skip(node, found)
            return 0
        form = "attention" if self.form == "auto" else self.form
        try:
            op_type, value = writer.write(found, form)
        except Mismatch as e:
            ctx.skip(node, str(e))
            return 0
        final = found.final
        value.type, value.shape = final.type or ir.TensorType(ir.DataType.FLOAT), final.shape
        if not forward(final, value):
            raise AssertionError(f"{final.name}: a node output can always stand for another")
        shapes.replace(final, value)
        for asks, axis in found.lengths.items():
            asks.replace_input_with(0, value)
            for name, number in (("start", axis), ("end", axis + 1)):
                asks.attributes[name] = ir.AttrInt64(name, number)
        bias = (
            f", {len(found.terms)} biases"
            if len(found.terms) > 1
            else ", a bias"
            if found.terms
            else ""
        )
        ctx.touch(node, f"{op_type}: {found.heads} heads of {found.q[0].size}{bias}")
        return 1


def _counts(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.INT64, ir.DataType.INT32)


def _match(node: ir.Node, shapes: Probes, opset: int) -> Attention:
    standard = is_op(node, "Attention")
    found = match_standard(node, shapes) if standard else match_attention(node, shapes, opset)
    # ONNX Runtime takes 0 for an absent scale, and roots of it in the standard operator.
    need(0 < found.scale < np.inf, f"the scale of {label(node)} is {found.scale:g}")
    kinds = {s.dtype(found.context) for s in shapes.shapes}
    need(kinds == {ir.DataType.FLOAT}, "ONNX Runtime's CPU kernels for attention take float32 only")
    ways(found, shapes)
    return found
