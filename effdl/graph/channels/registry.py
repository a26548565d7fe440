"""Which rule follows channels through which operator."""

from __future__ import annotations

import onnx_ir as ir

from effdl.graph.channels import rules_layers as layers
from effdl.graph.channels import rules_moves as moves
from effdl.graph.channels import rules_state as state
from effdl.graph.channels.trace import Rule, Trace, barrier
from effdl.graph.walk import MICROSOFT

_ELEMENTWISE = """
Abs Acos Acosh Add And Asin Asinh Atan Atanh BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast Ceil Celu Clip
Cos Cosh Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN
LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu
Shrink Sigmoid
Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor
"""
_POOLS = "AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool"
_REDUCTIONS = """
ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare
"""

RULES: dict[tuple[str, str], Rule] = {
    **{("", op): layers.elementwise for op in _ELEMENTWISE.split()},
    **{("", op): layers.spatial for op in _POOLS.split()},
    **{("", op): layers.reduce for op in _REDUCTIONS.split()},
    **{("", op): moves.reshape for op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze")},
    **{("", op): layers.along_axis(-1) for op in ("Softmax", "LogSoftmax", "Hardmax")},
    **{("", op): state.recurrent for op in ("LSTM", "GRU", "RNN")},
    **{("", op): layers.quantize for op in ("QuantizeLinear", "DequantizeLinear")},
    **{(MICROSOFT, op): layers.elementwise for op in ("BiasGelu", "FastGelu", "Gelu", "QuickGelu")},
    ("", "Dropout"): layers.first_input,
    ("", "Conv"): layers.conv,
    (MICROSOFT, "FusedConv"): layers.conv,
    ("", "ConvTranspose"): layers.conv_transpose,
    ("", "BatchNormalization"): layers.batch_norm,
    ("", "InstanceNormalization"): layers.batch_norm,
    ("", "LayerNormalization"): layers.layer_norm,
    ("", "RMSNormalization"): layers.layer_norm,
    ("", "SimplifiedLayerNormalization"): layers.layer_norm,
    ("", "LpNormalization"): layers.along_axis(-1),
    ("", "MatMul"): layers.matmul,
    ("", "Gemm"): layers.gemm,
    (MICROSOFT, "FusedGemm"): layers.gemm,
    ("", "DepthToSpace"): layers.depth_to_space,
    ("", "SpaceToDepth"): layers.space_to_depth,
    ("", "Transpose"): moves.transpose,
    ("", "Concat"): moves.concat,
    ("", "Split"): moves.split,
    ("", "Slice"): moves.slice_,
    ("", "Gather"): moves.gather,
    ("", "Expand"): moves.expand,
    ("", "Tile"): moves.tile_or_pad,
    ("", "Pad"): moves.tile_or_pad,
    ("", "Resize"): moves.resize,
    ("", "Upsample"): moves.resize,
    ("", "Shape"): moves.shape,
    (MICROSOFT, "Attention"): state.packed_attention,
    (MICROSOFT, "MultiHeadAttention"): state.multi_head,
    ("", "Attention"): state.standard_attention,
}


def follow(trace: Trace, node: ir.Node) -> None:
    """Write down what one node does to channels; an operator without a rule stops them."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    rule = RULES.get((domain, node.op_type))
    if rule is None or any(a.is_ref() for a in node.attributes.values()):
        barrier(trace, node)
    else:
        rule(trace, node)
