"""Factors between a norm and the layers that read it: what is taken from one is given to the other."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.walk import is_op
from effdl.graph.weights import Names, add_initializer, constant

NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")


def norm_before(value: ir.Value, readers: Collection[ir.Node]) -> ir.Node | None:
    """Return the norm whose scale can take factors of ``value``, None where others would see them.

    Args:
        value: what the layers read.
        readers: the layers, which take ``value`` as their first input and whose weights take the inverse.
    """
    node = value.producer()
    if (
        node is None
        or not is_op(node, *NORMS)
        or value is not node.outputs[0]
        or value.is_graph_output()
    ):
        return None
    if any(use.node not in readers or use.idx != 0 for use in value.uses()):
        return None
    width = None
    for given in node.inputs[1:]:
        array = constant(given) if given is not None else np.zeros(0)
        if array is None or (array.size and array.ndim != 1):
            return None
        width = array.size or width
    return node if width else None


def divide(norm: ir.Node, factors: npt.NDArray[np.float32], names: Names) -> None:
    """Divide what a norm gives by ``factors``, one per channel."""
    graph = norm.graph
    assert isinstance(graph, ir.Graph)
    for index, value in enumerate(norm.inputs):
        array = constant(value) if index else None
        if value is None or array is None:
            continue
        scaled = (array.astype(np.float64) / factors).astype(array.dtype)
        made = add_initializer(graph, names, f"{value.name}_divided", scaled)
        norm.replace_input_with(index, made)
