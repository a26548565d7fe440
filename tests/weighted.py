"""Small models with given weights, for the tests of passes that change weights."""

import numpy as np
import onnx
import onnx_ir as ir

from effdl.graph import io


def weighted(text: str, **weights: np.ndarray) -> ir.Model:
    """A checked model from ONNX's textual syntax; the graph inputs named in ``weights`` become them."""
    proto = onnx.parser.parse_model(text)
    inputs = [i for i in proto.graph.input if i.name not in weights]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return io.from_proto(proto, "text", None)


def normal(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    """Normal random numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def weight(model: ir.Model, name: str) -> np.ndarray:
    """The initializer ``name`` of the main graph."""
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()
