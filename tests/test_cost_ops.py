from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from effdl.graph.cost import model_cost
from effdl.runtime.session import open_session

Shape = tuple[int, ...]
_RESULTS = {
    "ConvInteger": TensorProto.INT32,
    "MatMulInteger": TensorProto.INT32,
    "QLinearConv": TensorProto.UINT8,
    "QLinearMatMul": TensorProto.UINT8,
}


def one_node(
    op: str,
    inputs: dict[str, tuple[int, Shape] | np.ndarray],
    outputs: int = 1,
    domain: str = "",
    opset: int = 17,
    **attributes: object,
) -> ir.Model:
    """A model of one node; arrays become initializers."""
    values, initializers = [], []
    for name, what in inputs.items():
        if isinstance(what, np.ndarray):
            initializers.append(onnx.numpy_helper.from_array(what, name))
        else:
            values.append(helper.make_tensor_value_info(name, *what))
    names = [f"y{k}" for k in range(outputs)]
    node = helper.make_node(op, list(inputs), names, name="n", domain=domain, **attributes)
    dtype = _RESULTS.get(op, TensorProto.FLOAT)
    results = [helper.make_tensor_value_info(n, dtype, None) for n in names]
    graph = helper.make_graph([node], "g", values, results, initializers)
    opsets = [helper.make_opsetid("", opset)]
    if domain:
        opsets.append(helper.make_opsetid(domain, 1))
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def f(*shape: int) -> tuple[int, Shape]:
    return TensorProto.FLOAT, shape


def w(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


class Counted:
    """Counts the products of a naive loop."""

    def __init__(self) -> None:
        self.products = 0

    def mul(self, a: float, b: float) -> float:
        self.products += 1
        return a * b


def naive_conv(
    x: np.ndarray, k: np.ndarray, group: int, stride: int, dilation: int, pad: int
) -> tuple[np.ndarray, int]:
    count = Counted()
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    batch, _, height, width = x.shape
    outs, per_group, kh, kw = k.shape
    oh = (height - dilation * (kh - 1) - 1) // stride + 1
    ow = (width - dilation * (kw - 1) - 1) // stride + 1
    y = np.zeros((batch, outs, oh, ow))
    for b, o, i, j in itertools.product(*map(range, y.shape)):
        first = (o // (outs // group)) * per_group
        for c, u, v in itertools.product(range(per_group), range(kh), range(kw)):
            y[b, o, i, j] += count.mul(
                x[b, first + c, i * stride + u * dilation, j * stride + v * dilation], k[o, c, u, v]
            )
    return y, count.products


def naive_conv_transpose(
    x: np.ndarray, k: np.ndarray, group: int, stride: int, dilation: int
) -> tuple[np.ndarray, int]:
    count = Counted()
    batch, channels, height, width = x.shape
    _, per_group, kh, kw = k.shape
    oh = (height - 1) * stride + dilation * (kh - 1) + 1
    ow = (width - 1) * stride + dilation * (kw - 1) + 1
    y = np.zeros((batch, per_group * group, oh, ow))
    for b, c, i, j in itertools.product(*map(range, x.shape)):
        first = (c // (channels // group)) * per_group
        for o, u, v in itertools.product(range(per_group), range(kh), range(kw)):
            y[b, first + o, i * stride + u * dilation, j * stride + v * dilation] += count.mul(
                x[b, c, i, j], k[c, o, u, v]
            )
    return y, count.products


@settings(max_examples=15, deadline=None)
@given(
    group=st.sampled_from([1, 2, 4]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    pad=st.integers(0, 1),
    kernel=st.integers(1, 3),
    batch=st.integers(1, 2),
)
def test_conv_counts_the_products_of_a_loop(
    group: int, stride: int, dilation: int, pad: int, kernel: int, batch: int
) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, 4, 7, 6)).astype(np.float32)
    k = rng.standard_normal((8, 4 // group, kernel, kernel)).astype(np.float32)
    y, products = naive_conv(x, k, group, stride, dilation, pad)
    model = one_node(
        "Conv",
        {"x": f(*x.shape), "k": k, "b": w(8)},
        group=group,
        strides=[stride] * 2,
        dilations=[dilation] * 2,
        pads=[pad] * 4,
    )
    np.testing.assert_allclose(open_session(model).run({"x": x})["y0"], y + 1, rtol=1e-4, atol=1e-4)
    cost = model_cost(model)
    assert cost.macs == products
    assert cost.params == k.size + 8


@settings(max_examples=10, deadline=None)
@given(group=st.sampled_from([1, 2]), stride=st.integers(1, 3), dilation=st.integers(1, 2))
def test_conv_transpose_counts_the_products_of_a_loop(
    group: int, stride: int, dilation: int
) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 3, 5)).astype(np.float32)
    k = rng.standard_normal((4, 3, 2, 3)).astype(np.float32)
    y, products = naive_conv_transpose(x, k, group, stride, dilation)
    model = one_node(
        "ConvTranspose",
        {"x": f(*x.shape), "k": k},
        group=group,
        strides=[stride] * 2,
        dilations=[dilation] * 2,
    )
    np.testing.assert_allclose(open_session(model).run({"x": x})["y0"], y, rtol=1e-4, atol=1e-4)
    assert model_cost(model).macs == products


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm_counts_the_products_of_a_loop(trans_a: int, trans_b: int) -> None:
    a, b = (3, 4)[:: -1 if trans_a else 1], (4, 5)[:: -1 if trans_b else 1]
    count = Counted()
    for _ in itertools.product(range(3), range(5), range(4)):
        count.mul(1, 1)
    for op, domain in (("Gemm", ""), ("FusedGemm", "com.microsoft")):
        model = one_node(
            op, {"a": f(*a), "b": w(*b)}, domain=domain, transA=trans_a, transB=trans_b
        )
        assert model_cost(model).macs == count.products


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((3, 4), (4, 5)),
        ((2, 3, 4), (4, 5)),
        ((4,), (4, 5)),
        ((3, 4), (4,)),
        ((4,), (4,)),
        ((2, 1, 3, 4), (6, 4, 5)),
        ((6, 3, 4), (2, 1, 4, 5)),
    ],
)
def test_matmul_counts_the_inner_products(a: Shape, b: Shape) -> None:
    out = np.matmul(w(*a), w(*b))
    assert model_cost(one_node("MatMul", {"a": f(*a), "b": w(*b)})).macs == out.size * 4


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("ij,jk->ik", [(3, 4), (4, 5)], 3 * 4 * 5),
        ("bhid,bhjd->bhij", [(2, 3, 4, 8), (2, 3, 5, 8)], 2 * 3 * 4 * 5 * 8),
        ("...ij,...jk->...ik", [(7, 3, 4), (7, 4, 5)], 7 * 60),
        ("...ij,jk", [(7, 3, 4), (4, 5)], 7 * 60),
        ("ij->ji", [(3, 4)], 0),
        ("a,b,c->abc", [(2,), (3,), (4,)], 2 * 24),
    ],
)
def test_einsum(equation: str, shapes: list[Shape], macs: int) -> None:
    inputs = {f"x{k}": f(*s) for k, s in enumerate(shapes)}
    assert model_cost(one_node("Einsum", inputs, equation=equation)).macs == macs


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_recurrent(op: str, gates: int, direction: str) -> None:
    d = 2 if direction == "bidirectional" else 1
    inputs = {"x": f(7, 2, 5), "w": w(d, gates * 6, 5), "r": w(d, gates * 6, 6)}
    model = one_node(op, inputs, hidden_size=6, direction=direction)
    per_step = sum(gates * 6 for _ in range(5)) + sum(gates * 6 for _ in range(6))
    assert model_cost(model).macs == 7 * 2 * d * per_step
    assert model_cost(model).params == d * gates * 6 * 11


U8 = TensorProto.UINT8


def scales(*names: str) -> dict[str, np.ndarray]:
    return {n: np.array(1, np.uint8 if n.endswith("z") else np.float32) for n in names}


@pytest.mark.parametrize(
    ("op", "domain", "inputs", "attributes", "macs"),
    [
        (
            "ConvInteger",
            "",
            {"x": (U8, (1, 2, 5, 5)), "w": w(3, 2, 3, 3, dtype=np.uint8)},
            {},
            27 * 18,
        ),
        (
            "QLinearConv",
            "",
            {
                "x": (U8, (1, 2, 5, 5)),
                **scales("xs", "xz"),
                "w": w(3, 2, 3, 3, dtype=np.uint8),
                **scales("ws", "wz", "ys", "yz"),
            },
            {},
            27 * 18,
        ),
        ("MatMulInteger", "", {"a": (U8, (2, 3, 4)), "b": w(4, 5, dtype=np.uint8)}, {}, 120),
        (
            "QLinearMatMul",
            "",
            {
                "a": (U8, (3, 4)),
                **scales("as", "az"),
                "b": w(4, 5, dtype=np.uint8),
                **scales("bs", "bz", "ys", "yz"),
            },
            {},
            60,
        ),
        (
            "QGemm",
            "com.microsoft",
            {
                "a": (U8, (3, 4)),
                **scales("as", "az"),
                "b": w(5, 4, dtype=np.uint8),
                **scales("bs", "bz"),
            },
            {"transB": 1},
            60,
        ),
        (
            "FusedConv",
            "com.microsoft",
            {"x": f(1, 2, 5, 5), "w": w(3, 2, 3, 3)},
            {"activation": "Relu"},
            27 * 18,
        ),
        (
            "FusedMatMul",
            "com.microsoft",
            {"a": f(2, 4, 3), "b": f(2, 5, 4)},
            {"transA": 1, "transB": 1},
            120,
        ),
        (
            "DynamicQuantizeMatMul",
            "com.microsoft",
            {"a": f(3, 4), "b": w(4, 5, dtype=np.uint8), **scales("bs", "bz")},
            {},
            60,
        ),
        (
            "Attention",
            "com.microsoft",
            {"x": f(2, 5, 8), "w": w(8, 24), "b": w(24)},
            {"num_heads": 2},
            2 * 5 * 8 * 24 + 2 * 5 * 5 * 16,
        ),
        (
            "MultiHeadAttention",
            "com.microsoft",
            {"q": f(2, 5, 8), "k": f(2, 7, 8), "v": f(2, 7, 6)},
            {"num_heads": 2},
            2 * 5 * 7 * 14,
        ),
        ("Relu", "", {"x": f(3, 4)}, {}, 0),
        ("MaxPool", "", {"x": f(1, 2, 4, 4)}, {"kernel_shape": [2, 2]}, 0),
    ],
)
def test_quantized_and_fused_operators(
    op: str, domain: str, inputs: dict, attributes: dict, macs: int
) -> None:
    cost = model_cost(one_node(op, inputs, domain=domain, **attributes))
    assert (cost.macs, cost.unknown_ops) == (macs, ())


@pytest.mark.parametrize("rank", [3, 4])
def test_attention_of_opset_23(rank: int) -> None:
    shapes = [(2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)]
    attributes = {}
    if rank == 3:
        shapes = [(s[0], s[2], s[1] * s[3]) for s in shapes]
        attributes = {"q_num_heads": 4, "kv_num_heads": 2}
    inputs = {n: f(*s) for n, s in zip("qkv", shapes, strict=True)}
    cost = model_cost(one_node("Attention", inputs, opset=23, **attributes))
    assert cost.macs == 2 * 4 * 5 * 7 * (8 + 6)
