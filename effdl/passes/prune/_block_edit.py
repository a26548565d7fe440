"""Takes a residual block out of a model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.edit import forward, remove_if_unused
from effdl.graph.insert import Builder
from effdl.graph.walk import float_attr, is_op, opset
from effdl.graph.weights import Names
from effdl.passes.prune._block_find import Block, is_skip_norm, summed

Array = npt.NDArray[np.generic]
Float = npt.NDArray[np.float64]
_SKIP_NORM_EPSILON = 1e-12


@dataclass(frozen=True)
class Cut:
    """A block by the names that it has in every copy of a model.

    Args:
        name: of the join, for logs.
        out: the first output of the join.
        side: the input of the join that the branch is.
        nodes: the branch's nodes and the join, by their first outputs.
        macs: multiply-accumulates of the branch.
        mean: of each channel of the branch, in a form that can be added in its place; None: not known.
    """

    name: str
    out: str
    side: int
    nodes: tuple[str, ...]
    macs: int
    mean: Array | None


def cut_of(block: Block, mean: Float | None) -> Cut:
    """Return the names of a block; ``mean`` is that of each of its channels."""
    array = None
    if mean is not None:
        tail = [1] * (block.rank - 2) if block.axis == 1 else []
        array = mean.astype(block.dtype.numpy()).reshape(-1, *tail)
    return Cut(
        block.name,
        block.join.outputs[0].name or "",
        block.side,
        tuple(n.outputs[0].name or "" for n in block.nodes),
        block.macs,
        array,
    )


def joins(model: ir.Model) -> dict[str, ir.Node]:
    """Return what may be the join of a block, by its first output."""
    return {n.outputs[0].name or "": n for n in model.graph if is_op(n, "Add") or is_skip_norm(n)}


def drop(model: ir.Model, cut: Cut, names: Names, *, mean: bool) -> dict[str, str]:
    """Take a block out.

    Args:
        model: is changed; a model in which the join is gone already stays as it is.
        cut: the block.
        names: of the model.
        mean: put the mean of the branch in its place.

    Returns:
        Values that stand for others from now on, and for nothing else: what a layer before the block should
        put out, by the name of what it does put out.
    """
    join = joins(model).get(cut.out)
    if join is None:
        return {}
    branch, short = join.inputs[cut.side], join.inputs[1 - cut.side]
    assert branch is not None
    assert short is not None
    if mean and cut.mean is not None:
        return _put_mean(model, join, cut, names)
    out = summed(join)
    like = out.name or ""
    join.replace_input_with(cut.side, None)
    _remove_behind(branch)
    join.replace_input_with(1 - cut.side, None)
    free = not short.uses() and not short.is_graph_output()
    builder = Builder(model.graph, names, opset(model), join)
    if is_skip_norm(join):
        free = free and out is not join.outputs[0] and _bias(join) is None
        _replace_norm(join, short, builder)
    else:
        _stand_for(out, short, builder)
    remove_if_unused(join)
    return _stand_ins(short, like) if free else {}


def _stand_for(out: ir.Value, value: ir.Value, builder: Builder) -> None:
    """Let a value be read in place of another; an output of the graph keeps a node of its own."""
    if out.is_graph_output():
        value = builder.op("Identity", [value], out.name)
    forward(out, value)


def _put_mean(model: ir.Model, join: ir.Node, cut: Cut, names: Names) -> dict[str, str]:
    branch, short = join.inputs[cut.side], join.inputs[1 - cut.side]
    assert branch is not None
    assert short is not None
    assert cut.mean is not None
    builder = Builder(model.graph, names, opset(model), join)
    constant = builder.constant(cut.mean, f"{cut.name}/mean")
    if is_skip_norm(join):
        join.replace_input_with(cut.side, None)
        _remove_behind(branch)
        _replace_norm(join, builder.op("Add", [short, constant], cut.name), builder)
        remove_if_unused(join)
    else:
        join.replace_input_with(cut.side, constant)
        _remove_behind(branch)
    return {}


def _replace_norm(join: ir.Node, short: ir.Value, builder: Builder) -> None:
    """Let the sum and the norm of a SkipLayerNormalization be those of the shortcut alone."""
    gamma, beta = (*join.inputs[2:4], None)[:2]
    bias = _bias(join)
    base = short if bias is None else builder.op("Add", [short, bias], join.name)
    epsilon = float_attr(join, "epsilon", _SKIP_NORM_EPSILON)
    made = builder.op(
        "LayerNormalization", [base, gamma, beta], join.name, {"axis": -1, "epsilon": epsilon}
    )
    forward(join.outputs[0], made)
    if len(join.outputs) > 3:
        _stand_for(join.outputs[3], base, builder)


def _bias(join: ir.Node) -> ir.Value | None:
    return join.inputs[4] if len(join.inputs) > 4 else None


def _remove_behind(value: ir.Value) -> None:
    """Remove what made a value as far as nothing else reads it."""
    todo = [value.producer()]
    while todo:
        node = todo.pop()
        if node is not None and node.graph is not None:
            makers = [v.producer() for v in node.inputs if v is not None]
            todo += makers if remove_if_unused(node) else []


def _stand_ins(short: ir.Value, out: str) -> dict[str, str]:
    """Return the shortcut, and what it is the Relu of where all that read it take its Relu again."""
    found = {short.name or "": out}
    users = [u.node for u in short.uses()]
    maker = short.producer()
    if users and all(is_op(n, "Relu") for n in users):
        while maker is not None and is_op(maker, "Relu"):
            inner = maker.inputs[0]
            if inner is None or len(list(inner.uses())) > 1 or inner.is_graph_output():
                break
            found[inner.name or ""] = out
            maker = inner.producer()
    return found
