"""The one file that imports private names of other packages: an upgrade breaks it and nothing else."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx.external_data_helper import _get_all_tensors


def all_tensors(proto: onnx.ModelProto) -> Iterable[onnx.TensorProto]:
    """Yield every tensor of a message: initializers and attributes, subgraphs and functions too."""
    tensors: Iterable[onnx.TensorProto] = _get_all_tensors(proto)
    return tensors
