"""Factors and shifts between layers: what is computed stays, what 8 bits make of it gets better."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdl.data.feeds import Feeds
from effdl.graph import io
from effdl.graph.weights import constant
from effdl.passes.equalize import Equalize
from effdl.passes.quantize.static import QuantizeStatic
from effdl.solve.equalize import Reader, equalize
from tests.support import context, outputs, rel_l2
from tests.test_quantize_static import fill

CONVS = """<ir_version: 8, opset_import: ["": 13]>
g (float[N,3,10,10] x) => (float[N,5,6,6] y)
<float[8,3,3,3] w1, float[8] b1, float[8,1,3,3] wd, float[8] bd, float[5,8,1,1] w2, float[5] b2> {
  c = Conv(x, w1, b1)
  r = Relu(c)
  d = Conv<group=8, pads=[0,0,0,0]>(r, wd, bd)
  p = LeakyRelu<alpha=0.1>(d)
  y = Conv(p, w2, b2)
}"""
GROUPED = """<ir_version: 8, opset_import: ["": 13]>
g (float[N,4,8,8] x) => (float[N,6,3,3] y)
<float[8,4,3,3] w1, float[8] b1, float[8,1,1] slope, float[6,4,2,2] w2> {
  c = Conv<pads=[1,1,1,1]>(x, w1, b1)
  r = PRelu(c, slope)
  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
  y = Conv<group=2>(m, w2)
}"""
NORM = """<ir_version: 8, opset_import: ["": 17]>
g (float[N,6,40] x) => (float[N,6,8] y, float[N,6,8] z)
<float[40] s, float[40] b, float[40,8] wq, float[8] bq, float[40,8] wk, float[8] bk> {
  n = LayerNormalization<axis=-1>(x, s, b)
  q = MatMul(n, wq)
  y = Add(q, bq)
  k = MatMul(n, wk)
  z = Add(bk, k)
}"""
GEMMS = """<ir_version: 8, opset_import: ["": 13]>
g (float[N,12] x) => (float[N,4] y)
<float[16,12] w1, float[16] b1, float[16,4] w2, float[4] b2> {
  a = Gemm<transB=1>(x, w1, b1)
  r = Relu(a)
  y = Gemm(r, w2, b2)
}"""
NETS = {"convs": CONVS, "grouped": GROUPED, "norm": NORM, "gemms": GEMMS}


def uneven(text: str, seed: int = 0) -> ir.Model:
    """A net in which a few channels of the first layer are much larger than the others."""
    model = fill(text, seed)
    for name, at in (("w1", 0), ("b1", 0), ("s", 0), ("b", 0), ("wd", 0), ("bd", 0)):
        value = model.graph.initializers.get(name)
        if value is not None:
            array = np.array(constant(value))
            large = np.ones(array.shape[at], np.float32)
            large[1::5] = 30.0
            array *= large.reshape(-1, *[1] * (array.ndim - 1))
            value.const_value = ir.tensor(array, name=name)
    return model


def feeds(model: ir.Model, count: int = 12, seed: int = 1) -> Feeds:
    rng = np.random.default_rng(seed)
    port = model.graph.inputs[0]
    assert port.shape is not None
    shape = [4 if not isinstance(d, int) else d for d in port.shape]
    return Feeds(
        [{port.name or "": rng.standard_normal(shape).astype(np.float32)} for _ in range(count)],
        "test",
        True,
    )


@pytest.mark.parametrize("name", NETS)
def test_the_outputs_stay_and_8_bits_lose_less(name: str) -> None:
    before = uneven(NETS[name])
    data = feeds(before)
    after = before.clone()
    ctx = context(data)
    assert Equalize().run(after, ctx) > 0
    assert ctx.log.touched
    io.check(after)
    feed = next(iter(feeds(before, 1, 5)))
    for want, got in zip(outputs(before, feed), outputs(after, feed), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)
    assert Equalize().run(after.clone(), context(data)) == 0
    lost = []
    for model in (before, after):
        small = model.clone()
        step = QuantizeStatic(range_search=0, adaptive_rounding=False)
        assert step.run(small, context(data)) > 0
        want, got = outputs(before, feed), outputs(small, feed)
        lost.append(np.mean([rel_l2(a, b) for a, b in zip(want, got, strict=True)]))
    assert lost[1] < 0.8 * lost[0]


def test_even_channels_are_left_alone() -> None:
    model = fill(CONVS)
    before = io.to_bytes(model)
    ctx = context(feeds(model))
    assert Equalize().run(model, ctx) == 0
    assert io.to_bytes(model) == before
    assert {reason for _, reason in ctx.log.skipped} == {"its channels are alike enough"}


def test_without_data_it_says_so() -> None:
    model = uneven(CONVS)
    ctx = context()
    assert Equalize().run(model, ctx) == 0
    assert "--data" in ctx.log.skipped[0][1]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("r = Relu(c)", "r = Clip(c, zero, six)"),
        ("r = Relu(c)", "r = Sigmoid(c)"),
        ("y = Conv(p, w2, b2)", "q = Conv(p, w2, b2)  t = ReduceSum(r)  y = Add(q, t)"),
    ],
)
def test_what_no_factor_passes_is_a_border(old: str, new: str) -> None:
    text = CONVS.replace(old, new).replace("float[5] b2>", "float[5] b2, float zero, float six>")
    ctx = context(feeds(uneven(text)))
    Equalize().run(uneven(text), ctx)
    assert len(ctx.log.touched) + len(ctx.log.skipped) == 1  # only behind the depthwise layer


def test_shared_weights_and_outputs_are_borders() -> None:
    shared = CONVS.replace("y = Conv(p, w2, b2)", "e = Conv(p, w2, b2)  y = Conv(e, we, b2)")
    shared = shared.replace("float[5] b2>", "float[5] b2, float[5,5,1,1] we>")
    ctx = context(feeds(uneven(shared)))
    Equalize().run(uneven(shared), ctx)
    names = [name for name, _ in (*ctx.log.touched, *ctx.log.skipped)]
    assert len(names) == 2  # the last site would change the bias that two layers share


@settings(max_examples=50, deadline=None)
@given(
    width=st.integers(1, 9),
    outputs_=st.integers(1, 5),
    shift=st.booleans(),
    seed=st.integers(0, 999),
)
def test_factors_are_sane_and_their_gain_is_what_is_told(
    width: int, outputs_: int, shift: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    low, high = (
        -rng.exponential(1, width),
        rng.exponential(1, width) * 10 ** rng.uniform(-2, 2, width),
    )
    low[rng.random(width) < 0.3] = 0.0
    high[rng.random(width) < 0.1] = 0.0
    mean, weight = (low + high) / 3, rng.standard_normal((outputs_, width))
    square = mean**2 + (high - low) ** 2 / 12
    reader = Reader(np.abs(weight).astype(np.float32)[None], np.square(weight).sum(0))
    found = equalize(low, high, mean, square, [reader], shift=shift)
    assert (found.factors > 0).all()
    assert np.isfinite(found.factors).all()
    assert 0 <= found.gain <= 1
    if not shift:
        assert not found.shift.any()

    def error(s: Any, z: Any) -> float:
        a, b = (low - z) / s, (high - z) / s
        step = (max(b.max(), 0) - min(a.min(), 0)) / 255
        rows = (np.abs(weight) * s).max(1) / 127
        noise = (np.maximum(square - 2 * z * mean + z * z, 0) / s**2)[None] * (weight != 0)
        return float(step**2 * (s**2 * weight**2).sum() + (rows**2 * noise.sum(1)).sum())

    before = error(np.ones(width), np.zeros(width))
    assert error(found.factors, found.shift) == pytest.approx(
        found.gain * before, rel=1e-6, abs=1e-12
    )


TRAPS = {
    "vector along the height": """<ir_version: 8, opset_import: ["": 13]>
        g (float[N,3,10,10] x) => (float[N,5,8,8] y)
        <float[8,3,3,3] w1, float[8] b1, float[8,1] bh, float[5,8,1,1] w2> {
          c = Conv(x, w1, b1)  a = Add(c, bh)  y = Conv(a, w2) }""",
    "vector of another length": """<ir_version: 8, opset_import: ["": 13]>
        g (float[N,3,8,10] x) => (float[N,5,6,8] y)
        <float[8,3,3,3] w1, float[8] b1, float[6,1] bh, float[5,8,1,1] w2> {
          c = Conv(x, w1, b1)  a = Add(c, bh)  y = Conv(a, w2) }""",
    "vector along the batch": """<ir_version: 8, opset_import: ["": 13]>
        g (float[8,3,10] x) => (float[8,5,8] y)
        <float[8,3,3] w1, float[8] b1, float[8,1,1] bn, float[5,8,1] w2> {
          c = Conv(x, w1, b1)  a = Add(c, bn)  y = Conv(a, w2) }""",
    "vector of a 1d convolution": """<ir_version: 8, opset_import: ["": 13]>
        g (float[N,3,10] x) => (float[N,5,8] y)
        <float[8,3,3] w1, float[8] b1, float[8,1] bc, float[5,8,1] w2, float[5] b2> {
          c = Conv(x, w1, b1)  a = Add(c, bc)  y = Conv(a, w2, b2) }""",
    "pool over the last axis": """<ir_version: 8, opset_import: ["": 13]>
        g (float[N,4,12] x) => (float[N,4,5] y)
        <float[12,16] w1, float[16,5] w2> {
          c = MatMul(x, w1)  a = AveragePool<kernel_shape=[3], pads=[1,1]>(c)  y = MatMul(a, w2) }""",
    "beta": """<ir_version: 8, opset_import: ["": 13]>
        g (float[N,12] x) => (float[N,4] y)
        <float[12,16] w1, float[16] b1, float[16,4] w2, float[4] b2> {
          c = Gemm<alpha=0.7, beta=0.5>(x, w1, b1)  y = Gemm(c, w2, b2) }""",
    "beta behind": """<ir_version: 8, opset_import: ["": 13]>
        g (float[N,12] x) => (float[N,4] y)
        <float[12,16] w1, float[16] b1, float[16,4] w2, float[4] b2> {
          c = Gemm(x, w1, b1)  y = Gemm<alpha=3.0, beta=0.5>(c, w2, b2) }""",
    "other outputs of a norm": """<ir_version: 8, opset_import: ["": 17]>
        g (float[N,6,16] x) => (float[N,6,16] n, float[N,6,8] y)
        <float[16] s, float[16] b, float[1,8] w2, float[8] b2> {
          n, m, d = LayerNormalization<axis=-1>(x, s, b)  q = MatMul(d, w2)  y = Add(q, b2) }""",
    "a column widened by a sum": """<ir_version: 8, opset_import: ["": 13]>
        g (float[N,12] x) => (float[N,4] y)
        <float[12,1] w1, float[16] b1, float[16,4] w2> {
          c = MatMul(x, w1)  a = Add(c, b1)  y = MatMul(a, w2) }""",
    "captured by a branch": """<ir_version: 8, opset_import: ["": 13]>
        g (float[N,12] x, bool k) => (float[N,4] y)
        <float[12,16] w1, float[16] b1, float[16,4] w2> {
          c = MatMul(x, w1)  a = Add(c, b1)
          y = If(k) <then_branch = t () => (float[N,4] r) { r = MatMul(a, w2) },
                     else_branch = e () => (float[N,4] s) { q = MatMul(a, w2)  s = Neg(q) }> }""",
}


@pytest.mark.parametrize("name", TRAPS)
def test_whatever_is_changed_computes_the_same(name: str) -> None:
    """Graphs in which a factor or a shift would go wrong, with every gain taken."""
    model = fill(TRAPS[name])
    for value in model.graph.initializers.values():
        array = np.array(constant(value))
        if array.ndim > 1:
            array[..., :1] *= 20.0
            value.const_value = ir.tensor(array, name=value.name)
    rng = np.random.default_rng(3)
    samples = []
    for _ in range(4):
        feed: dict[str, np.ndarray] = {}
        for port in model.graph.inputs:
            assert port.shape is not None
            shape = [4 if not isinstance(d, int) else d for d in port.shape]
            kind = port.dtype == ir.DataType.BOOL
            feed[port.name or ""] = (
                np.array(True) if kind else rng.standard_normal(shape).astype(np.float32)
            )
        samples.append(feed)
    after = model.clone()
    Equalize(least_gain=0).run(after, context(Feeds(samples, "test", True)))
    io.check(after)
    for want, got in zip(outputs(model, samples[0]), outputs(after, samples[0]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(np.abs(want).max()))


def test_a_layer_that_is_ignored_is_not_changed() -> None:
    model = uneven(GEMMS)
    for number, node in enumerate(model.graph):
        node.name = f"node{number}"
    for name in ("node0", "node2"):
        copy = model.clone()
        step = Equalize(ignore=(name,))
        assert step.run(copy, context(feeds(model))) == 0
        assert step.candidates(copy, context()) == []
        assert io.to_bytes(copy) == io.to_bytes(model)
    assert Equalize(targets=("node2",)).run(model, context(feeds(model))) == 1
