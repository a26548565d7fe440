"""A fixed small model whose time says how fast the machine is at this moment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from effdl.data.feeds import Feed

NAME = "yardstick"
_SIDE = 256
_LAYERS = 4


def write_yardstick(folder: Path) -> tuple[Path, Feed]:
    """Write four matrix products of 256 x 256 in float32 and return the file and its input.

    The same bytes every time: a baseline of another day was measured with this very model.
    """
    rng = np.random.default_rng(0)
    weights = [
        onnx.numpy_helper.from_array(
            (rng.standard_normal((_SIDE, _SIDE)) / np.sqrt(_SIDE)).astype(np.float32), f"w{k}"
        )
        for k in range(_LAYERS)
    ]
    names = ["x", *(f"h{k}" for k in range(1, _LAYERS)), "y"]
    nodes = [
        onnx.helper.make_node("MatMul", [names[k], f"w{k}"], [names[k + 1]]) for k in range(_LAYERS)
    ]
    ports = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [_SIDE, _SIDE])
        for n in ("x", "y")
    ]
    graph = onnx.helper.make_graph(nodes, NAME, ports[:1], ports[1:], weights)
    opsets = [onnx.helper.make_opsetid("", 17)]
    path = folder / f"{NAME}.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path, {"x": rng.standard_normal((_SIDE, _SIDE)).astype(np.float32)}
