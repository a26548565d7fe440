"""Operators that ONNX Runtime keeps in ONNX's own domain, though ONNX does not know them."""

from __future__ import annotations

import onnx

from effdl.graph.shape_values import graphs

_CONTRIB = "com.microsoft"
# Registered under the default domain by ONNX Runtime (contrib_ops, since version 1). Its transformer
# optimizer writes SimplifiedLayerNormalization so; the others are from before ONNX 1.5.
_OWN = frozenset(
    (
        *("SimplifiedLayerNormalization", "LayerNormalization", "Affine", "Crop", "DynamicSlice"),
        *("GivenTensorFill", "ImageScaler", "ParametricSoftplus", "Scale", "ScaledTanh"),
    )
)


def adopt(proto: onnx.ModelProto) -> None:
    """Move these operators of ``proto`` into the contrib domain, where nobody takes them for ONNX's.

    For checks and shape inference only: ONNX Runtime itself does not know all of them there.
    """
    imports = {o.domain: o.version for o in proto.opset_import}
    version = imports.get("", imports.get("ai.onnx", 1))
    moved = False
    for graph in graphs(proto.graph):
        for node in graph.node:
            if node.domain not in ("", "ai.onnx") or node.op_type not in _OWN:
                continue
            if not onnx.defs.has(node.op_type, version, ""):
                node.domain = _CONTRIB
                moved = True
    if moved and _CONTRIB not in imports:
        proto.opset_import.add(domain=_CONTRIB, version=1)
