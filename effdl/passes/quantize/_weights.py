"""Reading weights that may be larger than memory should hold at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from effdl.solve.quantize import Float

T = TypeVar("T")


def with_weight(tensor: ir.TensorProtocol, compute: Callable[[Float], T]) -> T:
    """Return ``compute(array)`` of a float tensor; a memory map is closed again afterwards.

    The map is our own: closing the tensor's would fail while a session still reads from it. What
    ``compute`` returns must not be a view of the array.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        return compute(np.asarray(tensor.numpy(), np.float32))
    own = ir.ExternalTensor(
        tensor.location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        base_dir=tensor.base_dir,
    )
    result = compute(np.asarray(own.numpy(), np.float32))
    own.release()
    return result
