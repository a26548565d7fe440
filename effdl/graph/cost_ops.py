"""Multiply-accumulates of one node, by the textbook definition of its operator.

One MAC is one product that is added to a sum. Padding counts as if it were data, a bias does not
count. Elementwise operators, activations, normalizations, pools and reductions count 0: they are bound
by memory, and counting them would blur what pruning and factorization change.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir

from effdl.graph.shapes import Shapes
from effdl.graph.walk import int_attr, str_attr

Static = tuple[int, ...]
Formula = Callable[[ir.Node, Shapes], int | None]

_FREE_TEXT = """
Abs Acos Acosh Add AffineGrid And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool
BatchNormalization Bernoulli BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor
BlackmanWindow Cast CastLike Ceil Celu CenterCropPad Clip Col2Im Compress Concat
ConcatFromSequence Constant ConstantOfShape Cos Cosh CumProd CumSum DepthToSpace DequantizeLinear
Div Dropout DynamicQuantizeLinear Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather
GatherElements GatherND Gelu GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual
GridSample GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity
ImageDecoder InstanceNormalization IsInf IsNaN LRN LayerNormalization LeakyRelu Less LessOrEqual
Log LogSoftmax LpNormalization LpPool Max MaxPool MaxRoiPool MaxUnpool Mean
MeanVarianceNormalization Min Mish Mod Mul Multinomial Neg NegativeLogLikelihoodLoss
NonMaxSuppression NonZero Not OneHot Optional OptionalGetElement OptionalHasElement Or PRelu Pad
Pow QuantizeLinear RMSNormalization RandomNormal RandomNormalLike RandomUniform RandomUniformLike
Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
ReduceProd ReduceSum ReduceSumSquare RegexFullMatch Relu Reshape Resize ReverseSequence RoiAlign
RotaryEmbedding Round Scatter ScatterElements ScatterND Selu SequenceAt SequenceConstruct
SequenceEmpty SequenceErase SequenceInsert SequenceLength Shape Shrink Sigmoid Sign
SimplifiedLayerNormalization Sin Sinh Size Slice Softmax SoftmaxCrossEntropyLoss Softplus Softsign
SpaceToDepth Split SplitToSequence Sqrt Squeeze StringConcat StringNormalizer StringSplit Sub Sum
Swish Tan Tanh TensorScatter ThresholdedRelu Tile TopK Transpose Trilu Unique Unsqueeze Upsample
Where Xor
"""
_FREE_CONTRIB_TEXT = """
BiasDropout BiasGelu BiasSoftmax BiasSplitGelu ConvertToFloat DequantizeLinear
EmbedLayerNormalization FastGelu GatherBlockQuantized Gelu GroupNorm Inverse Pad QLinearAdd
QLinearAveragePool QLinearConcat QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul
QLinearReduceMean QLinearSigmoid QLinearSoftmax QLinearWhere QuantizeLinear QuickGelu
RotaryEmbedding SkipGroupNorm SkipLayerNormalization SkipSimplifiedLayerNormalization Trilu Unique
"""
_FREE_ML_TEXT = """
ArrayFeatureExtractor Binarizer CastMap CategoryMapper DictVectorizer FeatureVectorizer Imputer
LabelEncoder Normalizer OneHotEncoder Scaler ZipMap
"""
_FREE = frozenset(_FREE_TEXT.split())
_FREE_CONTRIB = frozenset(_FREE_CONTRIB_TEXT.split())
_FREE_ML = frozenset(_FREE_ML_TEXT.split())
_CONTRIB = "com.microsoft"


def formula_of(node: ir.Node) -> Formula | None:
    """Return what counts the MACs of ``node``; None for an operator nobody knows here."""
    if node.domain in ("", "ai.onnx"):
        return _zero if node.op_type in _FREE else _STANDARD.get(node.op_type)
    if node.domain == _CONTRIB:
        return _zero if node.op_type in _FREE_CONTRIB else _IN_CONTRIB.get(node.op_type)
    if node.domain == "ai.onnx.ml" and node.op_type in _FREE_ML:
        return _zero
    return None


def _zero(node: ir.Node, shapes: Shapes) -> int | None:
    return 0


def _input(node: ir.Node, index: int, shapes: Shapes) -> Static | None:
    if index >= len(node.inputs):
        return None
    return shapes.static(node.inputs[index])


def _has(node: ir.Node, index: int) -> bool:
    return index < len(node.inputs) and node.inputs[index] is not None


def _conv(weight_index: int) -> Formula:
    """Each output number sums over (channels / group) x kernel products."""

    def formula(node: ir.Node, shapes: Shapes) -> int | None:
        weight = _input(node, weight_index, shapes)
        out = shapes.static(node.outputs[0])
        if weight is None or out is None:
            return None
        return math.prod(out) * math.prod(weight[1:])

    return formula


def _conv_transpose(node: ir.Node, shapes: Shapes) -> int | None:
    """Each input number is multiplied with (output channels / group) x kernel weights."""
    data, weight = _input(node, 0, shapes), _input(node, 1, shapes)
    if data is None or weight is None:
        return None
    return math.prod(data) * math.prod(weight[1:])


def _gemm(a_index: int, b_index: int) -> Formula:
    def formula(node: ir.Node, shapes: Shapes) -> int | None:
        a, b = _input(node, a_index, shapes), _input(node, b_index, shapes)
        if a is None or b is None or len(a) != 2 or len(b) != 2:
            return None
        columns = b[0] if int_attr(node, "transB", 0) else b[1]
        return math.prod(a) * columns

    return formula


def _matmul(a_index: int, b_index: int) -> Formula:
    """Each output number sums over the inner dimension."""

    def formula(node: ir.Node, shapes: Shapes) -> int | None:
        a, b = _input(node, a_index, shapes), _input(node, b_index, shapes)
        out = shapes.static(node.outputs[0])
        if out is None and a is not None and b is not None:
            out = _matmul_shape(a, b, node)
        transposed = bool(int_attr(node, "transA", 0))
        if out is None or a is None or not a:
            return None
        if int_attr(node, "transBatchA", 0):
            return None
        return math.prod(out) * (a[-2] if transposed and len(a) > 1 else a[-1])

    return formula


def _matmul_shape(a: Static, b: Static, node: ir.Node) -> Static | None:
    if any(int_attr(node, k, 0) for k in ("transA", "transB", "transBatchA", "transBatchB")):
        return None
    rows = a[-2:-1]
    columns = b[-1:] if len(b) > 1 else ()
    longest = max(len(a), len(b)) - 2
    batch_a, batch_b = (((1,) * longest + s[:-2])[-longest:] if longest > 0 else () for s in (a, b))
    return (*(max(x, y) for x, y in zip(batch_a, batch_b, strict=True)), *rows, *columns)


def _matmul_nbits(node: ir.Node, shapes: Shapes) -> int | None:
    a = _input(node, 0, shapes)
    if a is None or not a:
        return None
    return math.prod(a[:-1]) * int_attr(node, "N", 0) * int_attr(node, "K", 0)


def _recurrent(gates: int) -> Formula:
    """Per step, sequence and direction: gates x hidden x (input + hidden); peepholes not counted."""

    def formula(node: ir.Node, shapes: Shapes) -> int | None:
        data = _input(node, 0, shapes)
        recurrence = _input(node, 2, shapes)
        hidden = int_attr(node, "hidden_size", 0)
        if not hidden and recurrence is not None and node.domain != _CONTRIB:
            hidden = recurrence[-1]
        if data is None or len(data) != 3 or not hidden:
            return None
        directions = 2 if str_attr(node, "direction", "forward") == "bidirectional" else 1
        steps, batch, features = data  # layout 1 swaps the first two: the product is the same
        return steps * batch * directions * gates * hidden * (features + hidden)

    return formula


def _einsum(node: ir.Node, shapes: Shapes) -> int | None:
    """The product of the sizes of all labels, once per pair of operands; one operand: 0."""
    operands = [shapes.static(v) for v in node.inputs]
    terms = str_attr(node, "equation", "").replace(" ", "").split("->")[0].split(",")
    if any(o is None for o in operands) or len(terms) != len(operands):
        return None
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        labels = _einsum_labels(term, len(operand or ()))
        if len(labels) != len(operand or ()):
            return None
        for label, size in zip(labels, operand or (), strict=True):
            sizes[label] = max(sizes.get(label, 1), size)
    return math.prod(sizes.values()) * (len(operands) - 1)


def _einsum_labels(term: str, rank: int) -> list[str]:
    if "..." not in term:
        return list(term)
    before, _, after = term.partition("...")
    extra = rank - len(before) - len(after)
    # broadcast axes are aligned on the right: number them from there
    return [*before, *(f".{extra - k}" for k in range(extra)), *after]


def _attention_onnx(node: ir.Node, shapes: Shapes) -> int | None:
    """Attention of opset 23: Q K^T and its product with V, for all of past and present."""
    q, k, v = (_input(node, i, shapes) for i in range(3))
    if q is None or k is None or v is None:
        return None
    if len(q) == 4:
        batch, heads, steps, size = q
        length, value_size = k[2], v[3]
    else:
        heads = int_attr(node, "q_num_heads", 0)
        kv_heads = int_attr(node, "kv_num_heads", 0)
        if len(q) != 3 or not heads or not kv_heads:
            return None
        batch, steps, size = q[0], q[1], q[2] // heads
        length, value_size = k[1], v[2] // kv_heads
    past = _past_length(node, 4, 2, shapes)
    return None if past is None else batch * heads * steps * (length + past) * (size + value_size)


def _past_length(node: ir.Node, index: int, axis: int, shapes: Shapes) -> int | None:
    if not _has(node, index):
        return 0
    past = _input(node, index, shapes)
    return None if past is None or len(past) <= axis else past[axis]


def _attention_contrib(past_index: int) -> Formula:
    """Projection of the input to Q, K, V, then attention over past and present."""

    def formula(node: ir.Node, shapes: Shapes) -> int | None:
        data, weight = _input(node, 0, shapes), _input(node, 1, shapes)
        past = _past_length(node, past_index, 3, shapes)
        if data is None or weight is None or past is None or len(data) != 3 or len(weight) != 2:
            return None
        batch, steps, features = data
        attr = node.attributes.get("qkv_hidden_sizes")
        hidden = tuple(attr.as_ints()) if attr is not None else (weight[1] // 3,) * 3
        projection = batch * steps * features * weight[1]
        return projection + batch * steps * (steps + past) * (hidden[0] + hidden[2])

    return formula


def _multi_head_attention(node: ir.Node, shapes: Shapes) -> int | None:
    q = _input(node, 0, shapes)
    past = _past_length(node, 6, 2, shapes)
    if q is None or past is None:
        return None
    if len(q) == 5:  # query, key and value packed: batch, steps, heads, 3, size
        return q[0] * q[1] * (q[1] + past) * 2 * q[2] * q[4]
    k = _input(node, 1, shapes)
    if k is None or len(q) != 3:
        return None
    batch, steps, hidden = q
    if len(k) == 5:  # key and value packed: batch, length, heads, 2, size
        return batch * steps * (k[1] + past) * 2 * hidden
    v = _input(node, 2, shapes)
    if v is None:
        return None
    length = k[2] if len(k) == 4 else k[1]
    value_hidden = v[1] * v[3] if len(v) == 4 else v[2]
    return batch * steps * (length + past) * (hidden + value_hidden)


def _group_query_attention(node: ir.Node, shapes: Shapes) -> int | None:
    q = _input(node, 0, shapes)
    past = _past_length(node, 3, 2, shapes)
    if q is None or past is None or len(q) != 3:
        return None
    batch, steps, width = q
    if not _has(node, 1):  # query, key and value packed in the last axis
        heads, kv_heads = int_attr(node, "num_heads", 0), int_attr(node, "kv_num_heads", 0)
        if not heads:
            return None
        width = width * heads // (heads + 2 * kv_heads)
    return batch * steps * (steps + past) * 2 * width


_STANDARD: dict[str, Formula] = {
    "Attention": _attention_onnx,
    "Conv": _conv(1),
    "ConvInteger": _conv(1),
    "ConvTranspose": _conv_transpose,
    "DeformConv": _conv(1),
    "Einsum": _einsum,
    "GRU": _recurrent(3),
    "Gemm": _gemm(0, 1),
    "LSTM": _recurrent(4),
    "MatMul": _matmul(0, 1),
    "MatMulInteger": _matmul(0, 1),
    "QLinearConv": _conv(3),
    "QLinearMatMul": _matmul(0, 3),
    "RNN": _recurrent(1),
}
_IN_CONTRIB: dict[str, Formula] = {
    "Attention": _attention_contrib(4),
    "DynamicQuantizeLSTM": _recurrent(4),
    "DynamicQuantizeMatMul": _matmul(0, 1),
    "FusedConv": _conv(1),
    "FusedGemm": _gemm(0, 1),
    "FusedMatMul": _matmul(0, 1),
    "GroupQueryAttention": _group_query_attention,
    "MatMulBnb4": _matmul_nbits,
    "MatMulIntegerToFloat": _matmul(0, 1),
    "MatMulNBits": _matmul_nbits,
    "MultiHeadAttention": _multi_head_attention,
    "QAttention": _attention_contrib(8),
    "QGemm": _gemm(0, 3),
    "QLinearConv": _conv(3),
}
