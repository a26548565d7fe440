"""The pass ``simplify``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial

import onnx_ir as ir
from pydantic import Field

from effdl.graph.clean import clean
from effdl.graph.dedup import merge_initializers, merge_nodes
from effdl.graph.edit import raise_ir_version
from effdl.graph.folding import Folder
from effdl.graph.identities import remove_identities
from effdl.graph.inline import decided, inline_ifs
from effdl.graph.refute import settled_ifs
from effdl.graph.scalars import make_ranges_scalar
from effdl.graph.shape_vectors import merge_vectors
from effdl.graph.shapes import infer
from effdl.graph.unchanged import recall, remember
from effdl.passes.base import Context, Pass

_ROUNDS = 50


class Simplify(Pass):
    """Say the same with fewer nodes: constants, identities, duplicates and dead code go.

    What it does: computes what does not depend on an input with ONNX Runtime's own kernels; follows
    shape arithmetic element by element, dynamic sizes by name, so that a chain becomes a constant, or
    is made once for all its readers; inlines If nodes whose condition is known, or of which one branch
    makes a tensor of a rank that a later operator refuses; removes nodes that do nothing, pairs that
    undo each other, duplicate nodes and duplicate weights, masks that mask nothing, and what no output
    needs; lets neighbours be one: Slice, Concat, Clip, Unsqueeze and Squeeze in a row, a reduction and
    its Squeeze, a Transpose before Gemm, factors, zero states of LSTM and GRU. It repeats until nothing
    changes. Weights that are also graph inputs stop being inputs. Random operators, quantized weights
    and operators it does not know stay as they are.

    When it helps: always as the first step; exports of torch and Keras are full of shape arithmetic.
    Other passes find more afterwards, and the file becomes smaller.

    When it does not: ONNX Runtime does much of this when it loads a model, so latency often stays the
    same. A constant that would be larger than what makes it is not folded.

    Example:
        passes: [{simplify: {max_growth: 0}}]
    """

    max_growth: int = Field(default=1024, ge=0)
    """Bytes that folded constants may add to the file, beyond what they replace."""
    initializers_from_inputs: bool = True
    """Make weights that are also graph inputs plain constants: callers can no longer override them."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of rewrites, over all rounds."""
        kinds: Counter[str] = Counter()
        key = ("simplified", self.max_growth, self.initializers_from_inputs)
        declined = recall(model, key)
        if declined is not None:  # nothing was edited since the last time
            return _tell(kinds, declined, ctx)
        skipped: dict[tuple[str, str], None] = {}

        def skip(node: ir.Node | str, reason: str) -> None:
            name = node if isinstance(node, str) else node.name or node.op_type
            skipped[(name, reason)] = None

        if self.initializers_from_inputs:
            kinds["inputs_made_constant"] = _drop_defaults(model, ctx)
        folder = Folder(self.max_growth, ctx.touch, skip)
        for number in range(_ROUNDS):
            first, before = number == 0, kinds.total()
            skipped.clear()
            shapes = infer(model)
            known = partial(decided, shapes=shapes, known=folder.known)
            kinds["ifs_inlined"] += inline_ifs(model, known, ctx.touch)
            if kinds.total() > before:
                shapes = infer(model)
            kinds["folded"] += folder.run(model, shapes)
            kinds["identities"] += remove_identities(model, shapes, folder.known, ctx.touch, skip)
            kinds["scalars"] += make_ranges_scalar(model, shapes, ctx.touch)
            kinds["shape_vectors"] += merge_vectors(model, shapes, folder.known, ctx.touch)
            if first or kinds.total() > before:  # it reads all weights
                kinds["duplicate_weights"] += merge_initializers(model, ctx.touch)
            kinds["duplicate_nodes"] += merge_nodes(model, ctx.touch, skip)
            kinds["dead"] += clean(model)
            if kinds.total() == before:  # what costs much comes last
                kinds["ifs_inlined"] += inline_ifs(model, settled_ifs(model).get, ctx.touch)
            if kinds.total() == before:
                remember(model, key, skipped)
                break
        kinds["format_version"] = int(raise_ir_version(model))
        return _tell(kinds, skipped, ctx)


def _tell(kinds: Counter[str], declined: Iterable[tuple[str, str]], ctx: Context) -> int:
    """Report, and return the number of rewrites."""
    for name, reason in declined:
        ctx.skip(name, reason)
    for kind, count in kinds.items():
        if count:
            ctx.note(kind, count)
    return kinds.total()


def _drop_defaults(model: ir.Model, ctx: Context) -> int:
    """Take the weights out of the graph inputs."""
    inputs = model.graph.inputs
    weights = [v for v in inputs if v.is_initializer()]
    if weights:
        rest = [v for v in inputs if not v.is_initializer()]
        inputs.clear()
        inputs.extend(rest)
    for value in weights:
        ctx.touch(value.name or "", "no longer an input, only a constant")
    return len(weights)
