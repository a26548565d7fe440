"""Each operator in every order of axes: what its rule makes of it computes the same."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import onnx_ir as ir
import pytest

from effdl.graph import io
from effdl.graph.shapes import infer
from effdl.graph.transposes_edit import LayoutGraph
from effdl.graph.transposes_rules import _RULES, rule_of
from effdl.graph.weights import Names
from effdl.passes.fold._transposes import Search
from tests.support import feed_for, from_text, op_counts, outputs

R3, R4 = "float[2,3,4] x", "float[2,3,4,5] x"


@dataclass(frozen=True)
class Case:
    """One operator: the graph's inputs, its initializers, the node that makes y.

    Args:
        op: the node in ONNX's text form.
        inputs: of the graph.
        init: initializers.
        opset: of the default domain.
        accepts: fewest orders (of both directions, all inputs) that must be taken.
        out: further outputs of the graph.
    """

    op: str
    inputs: str = R3
    init: str = ""
    opset: int = 17
    accepts: int = 10
    out: str = "y"


UNARY = [
    *("Abs", "Ceil", "Cos", "Elu", "Erf", "Exp", "Floor", "HardSigmoid", "HardSwish", "Identity"),
    *("LeakyRelu", "Neg", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus"),
    *("Softsign", "Tan", "Tanh", "ThresholdedRelu", "Dropout", "Celu"),
]
REDUCE = ("L1", "L2", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
CASES = [
    *(Case(f"y = {op}(x)") for op in UNARY),
    Case("y = Cast <to = 6> (x)"),
    Case("y = Clip(x, lo, hi)", init="float lo = {-0.5}, float hi = {0.5}"),
    Case("y = Gelu(x)", opset=20),
    Case("a = Not(c)  y = Identity(a)", inputs="bool[2,3,4] c", accepts=8),
    # operands that broadcast
    Case("y = Add(x, z)", inputs=f"{R3}, float[2,3,4] z"),
    Case("y = Sub(z, x)", inputs=f"{R3}, float[2,1,4] z"),
    Case("y = Mul(x, z)", inputs=f"{R3}, float z"),
    Case("y = Mul(x, z)", inputs=f"{R3}, float[1] z"),
    Case("y = Mul(x, z)", inputs=f"{R3}, float[3,4] z", accepts=2),
    Case("y = Mul(z, x)", inputs=f"{R3}, float[4] z", accepts=2),
    Case("y = Pow(x, c)", init="float c = {2}"),
    Case("y = Add(x, c)", init="float[4] c = {1,2,3,4}"),
    Case("y = Div(c, x)", init="float[3,1] c = {1,2,3}"),
    Case("y = Mul(x, c)", init="float[2,3,1] c = {1,2,3,4,5,6}"),
    Case("y = Max(x, c, z)", inputs=f"{R3}, float[2,3,4] z", init="float[1,3,1] c = {0,1,-1}"),
    Case("y = PRelu(x, c)", init="float[3,1] c = {0.1,0.2,0.3}"),
    Case("y = Greater(x, z)", inputs=f"{R3}, float[2,3,4] z"),
    Case("y = Where(c, x, z)", inputs=f"{R3}, bool[2,1,4] c, float[1,3,1] z"),
    Case("y = Where(c, x, z)", inputs=f"{R3}, bool[2,3,4] c", init="float z = {3}"),
    Case("y = Mul(x, x)"),
    # reductions
    *(Case(f"y = Reduce{r} <axes = [1]> (x)") for r in REDUCE if r != "Sum"),
    Case("y = ReduceSum(x, a)", init="int64[1] a = {-1}"),
    Case("y = ReduceSum <keepdims = 0> (x, a)", init="int64[2] a = {0, -1}", accepts=5),
    Case("y = ReduceMean <axes = [2, 3], keepdims = 0> (x)", inputs=R4, accepts=20),
    Case("y = ReduceMean <keepdims = 0> (x, a)", R4, "int64[1] a = {1}", opset=18, accepts=20),
    Case("y = ReduceMax <keepdims = 0> (x)", accepts=5),
    Case("y = ReduceMax (x)"),
    Case("y = ReduceLogSum <axes = [0, 2], keepdims = 0> (p)", inputs="float[2,1,1] p", accepts=0),
    Case("y = ArgMax <axis = 1> (x)"),
    Case("y = ArgMin <axis = -1, keepdims = 0> (x)", accepts=6),
    # one axis
    Case("y = Concat <axis = -1> (x, z)", inputs=f"{R3}, float[2,3,2] z"),
    Case("y = Concat <axis = 1> (x, c)", init="float[2,1,4] c = {1,2,3,4,5,6,7,8}"),
    Case("y, z = Split <axis = 2> (x)", out="y, z"),
    Case("y, z = Split <axis = 1> (x, s)", init="int64[2] s = {1, 2}", out="y, z"),
    Case("y, z = Split <axis = 1, split = [1, 2]> (x)", opset=11, out="y, z"),
    Case("y, z = TopK <axis = 1> (x, k)", init="int64[1] k = {2}", out="y, z"),
    Case("y = Softmax <axis = 1> (x)"),
    Case("y = LogSoftmax(x)"),
    Case("y = Hardmax <axis = 0> (x)"),
    Case("y = Softmax <axis = 2> (x)", opset=11, accepts=2),
    Case("y = LpNormalization <axis = 1> (x)"),
    Case("y = CumSum <reverse = 1> (x, a)", init="int32 a = {-2}"),
    Case("y = GatherElements <axis = 1> (x, i)", inputs="float[2,4,3] x, int64[2,1,3] i"),
    Case("y = Gather <axis = 1> (x, i)", init="int64 i = {-1}", accepts=6),
    Case("y = Gather <axis = 1> (x, i)", init="int64[2] i = {2, 0}"),
    Case("y = Gather <axis = -1> (x, i)", init="int64[2,2] i = {2, 0, 1, 1}", accepts=8),
    # pieces
    Case("y = Slice(x, s, e, a)", init="int64[2] s = {0,1}, int64[2] e = {9,3}, int64[2] a = {-1,1}"),
    Case("y = Slice(x, s, e)", init="int32[2] s = {1,0}, int32[2] e = {2,2}"),
    Case("y = Slice(x, s, e, a, s)", init="int64[1] s = {-1}, int64[1] e = {-9}, int64[1] a = {2}"),
    Case("y = Slice <starts = [1], ends = [3], axes = [1]> (x)", opset=9),
    Case("y = Slice <starts = [0, 1], ends = [1, 3]> (x)", opset=9),
    Case("y = Pad(x, p)", init="int64[6] p = {0,1,2,0,0,1}"),
    Case('y = Pad <mode = "reflect"> (x, p)', init="int64[6] p = {0,1,2,0,0,1}"),
    Case("y = Pad(x, p, v, a)", init="int64[4] p = {1,0,2,1}, float v = {7}, int64[2] a = {2,-3}", opset=18),
    Case("y = Pad <pads = [0,1,2,0,0,1], value = 2.0> (x)", opset=10),
    Case("y = Tile(x, r)", init="int64[3] r = {1,2,3}"),
    Case("y = Expand(x, s)", inputs="float[2,1,1] x", init="int64[3] s = {2,3,4}"),
    Case("y = Expand(x, s)", inputs="float[2,1,1] x", init="int64[2] s = {3,1}"),
    # sizes
    Case("y = Resize <mode = \"nearest\"> (x, , s)", R4, "float[4] s = {1,1,2,3}", accepts=40),
    Case("y = Resize <mode = \"linear\"> (x, , s)", R4, "float[4] s = {1,1,2,1.5}", accepts=6),
    Case("y = Resize <mode = \"linear\"> (x, , , z)", R4, "int64[4] z = {2,3,8,7}", accepts=6),
    Case("y = Resize <mode = \"cubic\"> (x, , s)", R4, "float[4] s = {1,1,2,1.5}", accepts=6),
    Case("y = Resize <axes = [2, 3]> (x, , , z)", R4, "int64[2] z = {8,7}", opset=18, accepts=40),
    Case("y = Resize <mode = \"nearest\"> (x, s)", R4, "float[4] s = {1,1,2,2}", opset=10, accepts=40),
    Case("y = Resize <coordinate_transformation_mode = \"tf_crop_and_resize\", mode = \"linear\"> (x, r, s)",
         R4,
         "float[8] r = {0,0,0.2,0.1,1,1,0.8,0.7}, float[4] s = {1,1,2,2}", accepts=6),
    Case("y = Upsample <mode = \"nearest\", scales = [1.0, 1.0, 2.0, 3.0]> (x)", R4, opset=7, accepts=40),
    Case("y = Upsample <mode = \"nearest\"> (x, s)", R4, "float[4] s = {1,1,2,3}", opset=9, accepts=40),
    # shapes
    Case("y = Squeeze(x, a)", inputs="float[2,1,3,1,4] x", init="int64[2] a = {1,-2}", accepts=50),
    Case("y = Squeeze <axes = [1]> (x)", inputs="float[2,1,3] x", opset=11, accepts=6),
    Case("y = Unsqueeze(x, a)", init="int64[2] a = {0,-2}", accepts=50),
    Case("y = Unsqueeze <axes = [1]> (x)", inputs="float[2,3] x", opset=11, accepts=6),
    Case("y = Reshape(x, s)", R4, "int64[3] s = {2,12,5}", accepts=10),
    Case("y = Reshape(x, s)", R4, "int64[5] s = {0,3,2,2,-1}", accepts=30),
    Case("y = Reshape(x, s)", "float[n,3,4] x", "int64[3] s = {-1,1,12}", accepts=2),
    Case("y = Reshape(x, s)", "float[n,m,6] x", "int64[4] s = {0,0,2,3}", accepts=2),
    Case("y = Reshape(x, s)", "float[n,6] x", "int64[4] s = {0,1,1,6}", accepts=20),
    Case("y = Flatten(x)", "float[2,3,1,1] x", accepts=8),
    Case("y = Flatten <axis = 2> (x)", "float[2,3,4,1] x", accepts=3),
    Case("s = Shape(x)  y = Identity(s)", "float[a,b,c] x", accepts=5),
    Case("s = Shape <start = 1, end = -1> (x)  y = Identity(s)", "float[a,b,c] x", accepts=5),
    Case("s = Shape(x)  y = Gather(s, i)", "float[a,b,c] x", "int64[2] i = {-1, 0}", accepts=5),
    # layers
    Case("y = BatchNormalization(x, s, s, s, s)", init="float[3] s = {1,2,3}", accepts=2),
    Case("y = LRN <size = 3> (x)", R4, accepts=10),
    Case("y = LayerNormalization(x, s)", init="float[4] s = {1,2,3,4}", accepts=2),
    Case("y = GlobalAveragePool(x)", R4, accepts=40),
    Case("y = GlobalMaxPool(x)", R4, opset=18, accepts=40),
    Case("y = MatMul(x, w)", R4, "float[5,1] w = {1,2,3,4,5}", accepts=2),
    Case("y = MatMul(x, z)", inputs=f"{R4}, float[2,3,5,2] z", accepts=2),
    Case("y = Gemm(x, z)", inputs="float[2,3] x, float[3,4] z", accepts=2),
    Case("y = Gemm <transA = 1, transB = 1> (x, z)", inputs="float[3,2] x, float[4,3] z", accepts=2),
    Case('y = Einsum <equation = "abc,adc->abd"> (x, z)', inputs=f"{R3}, float[2,5,4] z", accepts=15),
    Case("q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z)", init="float s = {0.1}, uint8 z = {3}"),
    Case("y = QuantizeLinear <axis = -2> (x, s, z)", init="float[3] s = {0.1,0.2,0.3}, int8[3] z = {1,2,3}"),
    Case("y = DequantizeLinear <axis = 2> (x, s)", "int8[2,3,4] x", "float[4] s = {0.1,0.2,0.3,0.4}"),
    Case("y, s, z = DynamicQuantizeLinear(x)", out="y, s, z"),
    Case("y = com.microsoft.Gelu(x)"),
]  # fmt: skip


def build(case: Case) -> ir.Model:
    inits = f"<{case.init}>" if case.init else ""
    imports = f'"": {case.opset}, "com.microsoft": 1'
    outs = ", ".join(f"float {n}" for n in case.out.split(", "))
    text = f"<ir_version: 8, opset_import: [{imports}]> g ({case.inputs}) => ({outs}) {inits} {{ {case.op} }}"
    model = from_text(text)
    for value in model.graph.outputs:
        value.type, value.shape = None, None
    shapes = infer(model)
    for value in model.graph.outputs:
        dtype, dims = shapes.dtype(value), shapes.of(value)
        value.type = ir.TensorType(dtype if dtype is not None else ir.DataType.FLOAT)
        value.shape = None if dims is None else ir.Shape(dims)
    return model


def search_of(model: ir.Model, max_growth: int = 1024) -> Search:
    shapes = infer(model)
    names = Names(model)
    graph = LayoutGraph(model.graph, shapes, names, lambda n: True, max_growth)
    return Search(graph, model.opset_imports[""], lambda n: True)


def orders(rank: int) -> list[tuple[int, ...]]:
    found = [p for p in permutations(range(rank)) if p != tuple(range(rank))]
    return found if rank < 5 else found[:: len(found) // 40]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{c.inputs}-{c.init}-{c.opset}"[:90])
def test_every_order(case: Case) -> None:
    model = build(case)
    feed = feed_for(model, a=2, b=3, c=4, n=2, m=3)
    want = outputs(model, feed, optimize=False)
    taken = 0
    for at, node in enumerate(model.graph):
        ends: list[int | None] = [None, *range(len(node.inputs))]
        for end in ends:
            value = node.outputs[0] if end is None else node.inputs[end]
            if value is None or (end is not None and value.is_initializer()):
                continue
            dims = search_of(model).graph.dims(value)
            for perm in orders(len(dims or ())):
                taken += check(model, at, end, perm, feed, want)
    assert taken >= case.accepts


def check(
    model: ir.Model,
    at: int,
    end: int | None,
    perm: tuple[int, ...],
    feed: dict[str, np.ndarray],
    want: list[np.ndarray],
) -> bool:
    """Let one node work in the order ``perm``; whether it can. Its results must stay."""
    copy = model.clone()
    search = search_of(copy)
    node = copy.graph[at]
    plan = search.plan(node, perm, node.outputs[0] if end is None else end)
    if plan is None:
        return False
    assert (plan.outputs[0] if end is None else plan.inputs[end]) == perm
    plans = {node: plan}
    search.apply(plans, search.tensors(plans), {node})
    io.check(copy)
    for value, other in zip(model.graph.outputs, copy.graph.outputs, strict=True):
        assert (value.name, value.shape, value.type) == (other.name, other.shape, other.type)
    for a, b in zip(want, outputs(copy, feed, optimize=False), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6, err_msg=f"{perm} at {end}")
    return True


def test_every_rule_is_tried() -> None:
    tried = {op for case in CASES for op in op_counts(build(case))}
    alike = {"Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "CastLike", "Cosh"}
    alike |= {"IsInf", "IsNaN", "Log", "Mish", "Reciprocal", "Shrink", "Sinh", "Sqrt", "Swish"}
    alike |= {"And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Equal", "Less", "Or"}
    alike |= {"GreaterOrEqual", "LessOrEqual", "Mean", "Min", "Mod", "Sum", "Xor"}
    alike |= {"RMSNormalization", "ScatterElements"}
    assert set(_RULES) - tried <= alike


def test_no_rule_for_foreign_operators() -> None:
    node = ir.node("Relu", [ir.val("x")], domain="custom")
    assert rule_of(node) is None
    assert rule_of(ir.node("Conv", [ir.val("x"), ir.val("w")])) is None
