"""Which operators can work on tensors in another order of axes, and how.

A rule gets an order for one input or output and says what it means for all others, see ``Plan``.
What has no rule keeps the order it has.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from effdl.graph import transposes_axes as axes
from effdl.graph import transposes_reshape as views
from effdl.graph import transposes_sizes as sizes
from effdl.graph.dedup import dropout_is_identity
from effdl.graph.edit import has_reference
from effdl.graph.transposes import Ask, Declined, Perm, Plan, identity, moved
from effdl.graph.walk import int_attr, str_attr
from effdl.graph.weights import Names, constant, constant_tensor

Rule = Callable[[Ask], Plan]

_UNARY = """Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast CastLike Ceil Celu Clip Cos Cosh Elu
Erf Exp Floor Gelu HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal
Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu
DynamicQuantizeLinear"""
_BROADCAST = """Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less
LessOrEqual Max Mean Min Mod Mul Or PRelu Pow Sub Sum Where Xor"""
_REDUCE = """ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
ReduceSum ReduceSumSquare"""
_MICROSOFT_UNARY = ("FastGelu", "Gelu", "QuickGelu")


def rule_of(node: ir.Node) -> Rule | None:
    """Return the rule of an operator, None when it has none."""
    if has_reference(node):
        return None
    if node.domain == "com.microsoft":
        return _microsoft if node.op_type in _MICROSOFT_UNARY else None
    return _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None


def _unary(ask: Ask) -> Plan:
    """Operators that work element by element on their first input; the others are scalars."""
    ask.on_data()
    node = ask.node
    if node.op_type == "Dropout" and not dropout_is_identity(node, ask.opset):
        raise Declined("this Dropout is in training mode")
    outputs: tuple[Perm | None, ...] = (ask.perm,) * len(node.outputs)
    if node.op_type == "DynamicQuantizeLinear":
        outputs = (ask.perm, None, None)
        if ask.output and ask.index:
            raise Declined("its scale has no axes")
    return Plan((ask.perm, *(None,) * (len(node.inputs) - 1)), outputs)


def _microsoft(ask: Ask) -> Plan:
    if len(ask.node.inputs) > 1 and ask.given(1):
        raise Declined("it adds a bias along the last axis")
    return _unary(ask)


def _broadcast(ask: Ask) -> Plan:
    """Operators that work element by element on inputs that broadcast."""
    node = ask.node
    if ask.opset < 7:
        raise Declined("before opset 7 it broadcasts by an attribute")
    ranks = [len(ask.dims(i)) if ask.given(i) else 0 for i in range(len(node.inputs))]
    rank = max(ranks)
    asked = len(ask.perm)
    order = identity(rank - asked) + tuple(p + rank - asked for p in ask.perm)
    inputs: list[Perm | None] = []
    changes: list[axes.Edit | None] = []
    for i, value in enumerate(node.inputs):
        if not ask.output and i == ask.index:
            inputs.append(ask.perm)
            continue
        perm, edit = _operand(ask, i, ranks[i], order) if value is not None else (None, None)
        inputs.append(perm)
        changes.append(edit)
    return Plan(tuple(inputs), (order,), axes.edits(*changes))


def _operand(ask: Ask, i: int, rank: int, order: Perm) -> tuple[Perm | None, axes.Edit | None]:
    """How one operand takes part: it is transposed, replaced, or the same in any order."""
    value, out_rank = ask.node.inputs[i], len(order)
    if all(d == 1 for d in ask.dims(i)):
        return None, None
    lead = out_rank - rank
    tail = order[lead:]
    if min(tail) >= lead:
        inner = tuple(p - lead for p in tail)
        if inner == identity(rank):
            return None, None
    else:
        inner = None
    tensor = constant_tensor(value)
    array = constant(value)
    if tensor is not None and array is not None and value is not None:
        alone = len(list(value.uses())) == 1 and not value.is_graph_output()
        if alone or tensor.nbytes <= ask.small:
            full = np.reshape(array, (1,) * lead + array.shape).transpose(order)
            if inner is not None:
                full = full.reshape(full.shape[lead:])
            if alone:
                return None, axes.put_input(i, np.ascontiguousarray(full))
            key = (value, order, full.ndim)
            return None, axes.put_copy(i, np.ascontiguousarray(full), key, ask.copies)
    if inner is None:
        raise Declined(f"its input {i} has fewer axes than its output")
    return inner, None


def _fixed(*fixed: int) -> Rule:
    """Return the rule of operators to which the axes ``fixed`` mean something, and no others."""

    def rule(ask: Ask) -> Plan:
        ask.on_data()
        node = ask.node
        if any(a >= len(ask.perm) or ask.perm[a] != a for a in fixed):
            raise Declined("it needs its channels on axis 1")
        if node.op_type == "BatchNormalization":
            trains = int_attr(node, "training_mode", 0) or any(o.name for o in node.outputs[1:])
            if trains or not int_attr(node, "spatial", 1):
                raise Declined("it is not in inference form")
        others = (None,) * (len(node.inputs) - 1)
        return Plan((ask.perm, *others), (ask.perm, *(None,) * (len(node.outputs) - 1)))

    return rule


def _layer_norm(ask: Ask) -> Plan:
    """LayerNormalization and RMSNormalization: the axes it works over have to stay."""
    ask.on_data()
    node, rank = ask.node, len(ask.perm)
    axis = ask.axis("axis", -1, rank)
    if any(ask.perm[a] != a for a in range(axis, rank)):
        raise Declined("the axes it normalizes would move")
    if any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        raise Declined("its mean and deviation are used")
    for i in range(1, len(node.inputs)):
        if ask.given(i) and len(ask.dims(i)) > rank - axis:
            raise Declined("its scale has more axes than it normalizes")
    others = (None,) * (len(node.inputs) - 1)
    return Plan((ask.perm, *others), (ask.perm, *(None,) * (len(node.outputs) - 1)))


def _global_pool(ask: Ask) -> Plan:
    """GlobalAveragePool and GlobalMaxPool: as a reduction where the channels move."""
    rank = len(ask.perm)
    if ask.perm[:2] == (0, 1):
        return Plan((ask.perm,), (ask.perm,))
    at = sorted(moved(range(2, rank), ask.perm))
    op = "ReduceMean" if ask.node.op_type == "GlobalAveragePool" else "ReduceMax"
    as_input = ask.opset >= 18

    def edit(node: ir.Node, names: Names) -> None:
        node.op_type = op
        node.attributes["keepdims"] = ir.AttrInt64("keepdims", 1)
        put = axes.put_input(1, np.array(at, np.int64)) if as_input else axes.put_ints("axes", at)
        put(node, names)

    return Plan((ask.perm,), (ask.perm,), edit)


def _quantize(ask: Ask) -> Plan:
    """QuantizeLinear and DequantizeLinear: per tensor, or per axis."""
    ask.on_data()
    rank = len(ask.perm)
    plain = Plan((ask.perm, *(None,) * (len(ask.node.inputs) - 1)), (ask.perm,))
    scale = ask.dims(1)
    if all(d == 1 for d in scale) and len(scale) < 2 and rank:
        return plain
    if len(scale) != 1 or int_attr(ask.node, "block_size", 0):
        raise Declined("it is quantized in blocks")
    axis = ask.axis("axis", 1, rank)
    goal = moved([axis], ask.perm)[0]
    edit = None if goal == axis else axes.put_int("axis", goal)
    return Plan(plain.inputs, plain.outputs, edit)


def _gemm(ask: Ask) -> Plan:
    """Gemm reads either matrix transposed."""
    if ask.output or ask.index > 1:
        raise Declined("its product and its bias keep their order")
    name = ("transA", "transB")[ask.index]
    flipped = axes.put_int(name, 1 - int_attr(ask.node, name, 0))
    inputs: list[Perm | None] = [None] * len(ask.node.inputs)
    inputs[ask.index] = ask.perm
    return Plan(tuple(inputs), (None,), flipped)


def _einsum(ask: Ask) -> Plan:
    """Einsum takes any order of its inputs and gives any order of its output."""
    node = ask.node
    equation = str_attr(node, "equation", "").replace(" ", "")
    if "." in equation or "->" not in equation:
        raise Declined("its equation does not name every axis")
    left, out = equation.split("->")
    terms = left.split(",")
    if ask.output:
        out = "".join(out[p] for p in ask.perm)
    else:
        terms[ask.index] = "".join(terms[ask.index][p] for p in ask.perm)
    renewed = f"{','.join(terms)}->{out}"

    def edit(node: ir.Node, names: Names) -> None:
        node.attributes["equation"] = ir.AttrString("equation", renewed)

    inputs: list[Perm | None] = [None] * len(node.inputs)
    if not ask.output:
        inputs[ask.index] = ask.perm
    return Plan(tuple(inputs), (ask.perm if ask.output else None,), edit)


def _matmul(ask: Ask) -> Plan:
    """MatMul of stacks of matrices: the stack's axes may be sorted anew, alike on both sides."""
    ranks = [len(ask.dims(i)) for i in (0, 1)]
    rank = max(ranks)
    if len(ask.perm) != rank or ask.perm[-2:] != (rank - 2, rank - 1):
        raise Declined("it multiplies matrices on its last two axes")
    if min(ranks) == rank:
        return Plan((ask.perm, ask.perm), (ask.perm,))
    if min(ranks) == 2:
        return Plan(tuple(ask.perm if r == rank else None for r in ranks), (ask.perm,))
    raise Declined("its matrices are stacked on different axes")


_RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY.split(), _unary),
    **dict.fromkeys(_BROADCAST.split(), _broadcast),
    **dict.fromkeys(_REDUCE.split(), axes.reduction),
    **dict.fromkeys(("ArgMax", "ArgMin"), axes.arg_extreme),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), axes.softmax),
    **dict.fromkeys(("Resize", "Upsample"), sizes.resize),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantize),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), _global_pool),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _layer_norm),
    "BatchNormalization": _fixed(1),
    "Concat": axes.one_axis(None),
    "CumSum": axes.cumulative,
    "Dropout": _unary,
    "Einsum": _einsum,
    "Expand": axes.per_axis(1, "shapes", 8),
    "Flatten": views.flatten,
    "Gather": axes.gather,
    "GatherElements": axes.one_axis(0),
    "Gemm": _gemm,
    "LpNormalization": axes.one_axis(-1),
    "LRN": _fixed(1),
    "MatMul": _matmul,
    "Pad": axes.pads,
    "Reshape": views.reshape,
    "ScatterElements": axes.one_axis(0),
    "Shape": sizes.shape,
    "Slice": axes.slices,
    "Split": axes.one_axis(0),
    "Squeeze": axes.squeeze,
    "Tile": axes.per_axis(1, "repeats", 6),
    "TopK": axes.one_axis(-1),
    "Unsqueeze": axes.unsqueeze,
}
