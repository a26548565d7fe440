"""Activations written out in arithmetic around one node that is none (Erf, Tanh, Sigmoid, Clip)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import onnx_ir as ir

from effdl.graph.match import Expansion, Mismatch, Poly, attempt, expand, label, need
from effdl.graph.shapes import Shapes
from effdl.passes.fuse._replace import self_contained

_CLIMB = 6


@dataclass(frozen=True)
class Activation:
    """An activation in the graph: ``root`` is a function of ``x`` alone.

    Args:
        form: which of the forms of its pass it is.
        numbers: constants of the form, such as the alpha of a Sigmoid's argument.
    """

    x: ir.Value
    root: ir.Value
    nodes: tuple[ir.Node, ...]
    form: str = ""
    numbers: tuple[float, ...] = ()


def whole(
    anchor: ir.Node,
    x: ir.Value,
    argument: Expansion,
    wanted: Poly,
    shapes: Shapes,
    name: str,
    dtypes: Collection[ir.DataType],
) -> Activation:
    """Climb from ``anchor`` until the value is the whole formula.

    Args:
        anchor: the node whose output is the second atom of ``wanted``.
        x: the first atom.
        argument: how the input of ``anchor`` is made of x.
        wanted: the formula, a polynomial in x and the anchor's output.
        shapes: of the model.
        name: of the activation, for messages.
        dtypes: for which there is a kernel.

    Raises:
        Mismatch: what follows the anchor is something else, or is seen from outside.
    """
    dtype = shapes.dtype(x)
    need(
        dtype in dtypes,
        f"'{x.name}' is {dtype.name if dtype else 'of unknown type'}: no {name} kernel for it",
    )
    activated = anchor.outputs[0]
    value, near = activated, "nothing follows"
    for _ in range(_CLIMB):
        read = attempt(expand, value, [x, activated], rank(shapes, x))
        if isinstance(read, str):
            near = read
            break
        # constants of the argument may be coarser than those outside it
        if replace(read, rtol=max(read.rtol, argument.rtol)).equals(wanted):
            nodes = tuple(dict.fromkeys((*argument.nodes, anchor, *read.nodes)))
            found = Activation(x, value, nodes)
            self_contained(found, anchor)
            return found
        if value is not activated:
            near = f"what follows {label(anchor)} is another formula"
        users = list(dict.fromkeys(u.node for u in value.uses()))
        if len(users) != 1 or value.is_graph_output():
            what = "a graph output" if value.is_graph_output() else "used more than once"
            near = f"up to '{value.name}' it is no {name}, and '{value.name}' is {what}"
            break
        value = users[0].outputs[0]
    raise Mismatch(near)


def rank(shapes: Shapes, value: ir.Value) -> int | None:
    """Return how many dimensions ``value`` has, None when unknown."""
    dims = shapes.of(value)
    return None if dims is None else len(dims)
