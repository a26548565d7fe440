"""Weights of few bits: exact arithmetic of what is written, accuracy of how it was rounded."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from effdl.data.feeds import Feeds
from effdl.graph import io
from effdl.graph.clean import clean
from effdl.graph.cost import model_cost
from effdl.graph.shapes import infer
from effdl.graph.weights import weight_tensors
from effdl.passes.quantize._nbits import pack
from effdl.passes.quantize.weights import QuantizeWeights
from tests.support import context, feed_for, op_counts, outputs, rel_l2
from tests.test_quantize_dynamic import fill, fused_ops

NETWORK = """<ir_version: 10, opset_import: ["": 17]>
g (int64[N,S] ids) => (float[N,S,24] y)
<float[50,64] table, float[64,96] w1, float[24,96] w2, float[24] b2> {
  x = Gather(table, ids)
  h = MatMul(x, w1)
  a = Relu(h)
  s = Constant<value_ints = [-1, 96]>()
  flat = Reshape(a, s)
  g = Gemm<transB = 1, alpha = 0.5>(flat, w2, b2)
  ends = Constant<value_ints = [-1]>()
  first = Shape<end = 2>(ids)
  last = Constant<value_ints = [24]>()
  shape = Concat<axis = 0>(first, last)
  y = Reshape(g, shape)
}"""
STEP: dict[str, Any] = {"min_size": 1024}


def quantized(
    model: ir.Model, expected: int, feeds: Feeds | None = None, **options: Any
) -> ir.Model:
    after = model.clone()
    ctx = context(feeds)
    assert QuantizeWeights(**{**STEP, **options}).run(after, ctx) == expected
    assert len(ctx.log.touched) == expected
    clean(after)
    io.check(after)
    return after


def error(before: ir.Model, after: ir.Model, seed: int = 7) -> float:
    feed = feed_for(before, seed, N=3, S=5)
    pairs = zip(outputs(before, feed), outputs(after, feed), strict=True)
    return max(rel_l2(want, got) for want, got in pairs)


def samples(model: ir.Model, count: int = 12) -> Feeds:
    return Feeds([feed_for(model, 100 + k, N=2, S=16) for k in range(count)], "test", True)


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize(("bits", "limit"), [(4, 0.15), (8, 0.012)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_form_runs_and_is_near(bits: int, limit: float, block: int, symmetric: bool) -> None:
    model = fill(NETWORK)
    for level in (0, 4):
        after = quantized(
            model, 3, bits=bits, block_size=block, symmetric=symmetric, accuracy_level=level
        )
        counts = op_counts(after)
        assert counts["MatMulNBits"] == 2
        assert counts["GatherBlockQuantized"] == 1
        assert not {"MatMul", "Gemm", "Gather"} & set(counts)
        assert 0 < error(model, after) < limit


def test_it_is_an_eighth_of_the_size_and_runs_by_the_kernels() -> None:
    model = fill(NETWORK)
    after = quantized(model, 3, block_size=64)
    before, now = (sum(t.nbytes for t in weight_tensors(m)) for m in (model, after))
    assert now < before / 6
    assert fused_ops(after)["MatMulNBits"] == 2


def test_data_makes_it_more_accurate() -> None:
    model = fill(NETWORK)
    data = samples(model)
    nearest = error(model, quantized(model, 3, method="rtn"))
    seen = error(model, quantized(model, 3, data))
    assert seen < 0.9 * nearest


def test_the_report_tells_error_and_method() -> None:
    model = fill(NETWORK)
    ctx = context(samples(model))
    QuantizeWeights(**STEP).run(model, ctx)
    assert ctx.log.notes["method"] == "gptq"
    assert 0 < float(ctx.log.notes["mean_layer_error"]) < 0.05
    assert any("error" in what for _, what in ctx.log.touched)


def test_a_convolution_is_unfolded_when_the_model_is_loaded() -> None:
    model = fill(
        """<ir_version: 10, opset_import: ["": 17]>
        g (float[N,8,9,9] x) => (float[N,16,7,7] y) <float[16,8,3,3] w> { y = Conv(x, w) }"""
    )
    after = quantized(model, 1)
    assert op_counts(after) == {"Conv": 1, "Cast": 1, "Mul": 1}
    assert sum(t.nbytes for t in weight_tensors(after)) < 1300
    assert not {"Cast", "Mul"} & set(fused_ops(after))
    feed = feed_for(model, 3, N=2)
    assert 0 < rel_l2(outputs(model, feed)[0], outputs(after, feed)[0]) < 0.01


def test_a_shared_weight_is_stored_once() -> None:
    model = fill(
        """<ir_version: 10, opset_import: ["": 17]>
        g (float[N,64] x) => (float[N,64] y) <float[64,64] w> { h = MatMul(x, w) y = MatMul(h, w) }"""
    )
    after = quantized(model, 2)
    assert len(after.graph.initializers) == len({id(v) for v in after.graph.initializers.values()})
    names = [n.inputs[1].name for n in after.graph if n.op_type == "MatMulNBits"]
    assert len(set(names)) == 1


def test_inside_a_branch() -> None:
    model = fill(
        """<ir_version: 10, opset_import: ["": 17]>
        g (float[N,64] x, bool c) => (float[N,32] y) <float[64,32] w> {
            y = If (c) <
                then_branch = a () => (float[N,32] p) { p = MatMul(x, w) },
                else_branch = b () => (float[N,32] q) { m = MatMul(x, w) q = Neg(m) }
            >
        }"""
    )
    assert 0 < error(model, quantized(model, 2)) < 0.15


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(float[64] x) => (float[32] y) <float[64,32] w> { y = MatMul(x, w) }", "vector"),
        ("(float[N,64] x) => (float[N,8] y) <float[64,8] w> { y = MatMul(x, w) }", "elements"),
        ("(float[N,64] x, float[64,32] w) => (float[N,32] y) { y = MatMul(x, w) }", "computed"),
        (
            "(float[64,N] x) => (float[N,32] y) <float[64,32] w> { y = Gemm<transA=1>(x, w) }",
            "transposed",
        ),
        (
            "(float[N,64] x, float[N,32] b) => (float[N,32] y) <float[64,32] w> "
            "{ y = Gemm(x, w, b) }",
            "bias",
        ),
        ("(int64[N] i) => (float[N,40] y) <float[50,40] w> { y = Gather(w, i) }", "blocks of 32"),
        (
            "(float[N,2,64] x) => (float[N,2,32] y) <float[2,64,32] w> { y = MatMul(x, w) }",
            "dimensions",
        ),
    ],
)
def test_what_is_left_alone_and_why(text: str, reason: str) -> None:
    model = fill(f'<ir_version: 10, opset_import: ["": 17]> g {text}')
    before = io.to_bytes(model)
    ctx = context()
    assert QuantizeWeights(**STEP).run(model, ctx) == 0
    assert io.to_bytes(model) == before
    assert any(reason in why for _, why in ctx.log.skipped), ctx.log.skipped


def test_two_of_four_bits_in_a_byte() -> None:
    np.testing.assert_array_equal(pack(np.array([[1, 2, 3]], np.uint8), 4), [[0x21, 0x03]])
    np.testing.assert_array_equal(pack(np.array([[200]], np.uint8), 8), [[200]])


def test_a_second_run_finds_nothing_and_bytes_are_the_same_each_time() -> None:
    model = fill(NETWORK)
    data = samples(model)
    first, second = quantized(model, 3, data), quantized(model, 3, data)
    assert io.to_bytes(first) == io.to_bytes(second)
    assert QuantizeWeights(**STEP).run(first, context(data)) == 0


NORMED = """<ir_version: 10, opset_import: ["": 17]>
g (float[N,64] x) => (float[N,32] y, float[N,32] z)
<float[64] gamma, float[64] beta, float[64,32] wy, float[64,32] wz> {
  n = LayerNormalization(x, gamma, beta)
  y = MatMul(n, wy)
  z = MatMul(n, wz)
}"""


def with_outliers() -> ir.Model:
    """A norm of which two channels are forty times as large as the others, as in language models."""
    model = fill(NORMED)
    gamma = model.graph.initializers["gamma"].const_value
    assert gamma is not None
    array = np.ones(64, np.float32)
    array[[3, 40]] = 40
    model.graph.initializers["gamma"].const_value = ir.tensor(array, name="gamma")
    return model


def test_awq_moves_factors_into_the_norm() -> None:
    model = with_outliers()
    data = samples(model)
    exact = quantized(model, 2, data, method="awq", bits=8, accuracy_level=0)
    assert error(model, exact) < 0.02
    norm = next(n for n in exact.graph if n.op_type == "LayerNormalization")
    assert norm.inputs[1] is not None
    assert norm.inputs[1].name != "gamma"
    plain, scaled = (
        error(model, quantized(model, 2, data, method=m, accuracy_level=0)) for m in ("rtn", "awq")
    )
    assert scaled < 0.8 * plain


def test_awq_leaves_a_norm_that_others_read() -> None:
    model = with_outliers()
    normed = model.graph.node(0).outputs[0]
    normed.type, normed.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["N", 64])
    model.graph.outputs.append(normed)
    after = quantized(model, 2, samples(model), method="awq")
    norm = next(n for n in after.graph if n.op_type == "LayerNormalization")
    assert norm.inputs[1] is not None
    assert norm.inputs[1].name == "gamma"


@pytest.mark.parametrize("bits", [4, 8])
def test_shapes_and_cost_are_known_afterwards(bits: int) -> None:
    model = fill(NETWORK)
    after = quantized(model, 3, bits=bits)
    for node in after.graph:
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            shape = infer(after, {"N": 2, "S": 3}).static(node.outputs[0])
            assert shape is not None, node.op_type
    sizes = {"N": 2, "S": 3}
    assert model_cost(after, sizes).macs == model_cost(model, sizes).macs


def test_readers_of_one_weight_that_read_it_in_other_ways() -> None:
    """Transposed, or times a factor: the integers are others."""
    model = fill(
        """<ir_version: 10, opset_import: ["": 17]>
        g (float[N,64] x) => (float[N,64] a, float[N,64] b, float[N,64] c) <float[64,64] w> {
            a = MatMul(x, w)
            b = Gemm<transB = 1>(x, w)
            c = Gemm<alpha = 0.25>(x, w)
        }"""
    )
    assert error(model, quantized(model, 3, bits=8)) < 0.02


def test_awq_leaves_a_weight_that_another_layer_reads() -> None:
    model = with_outliers()
    model.graph.node(2).replace_input_with(1, model.graph.node(1).inputs[1])
    other = ir.node("MatMul", [model.graph.inputs[0], model.graph.node(1).inputs[1]], name="other")
    other.outputs[0].name = "o"
    other.outputs[0].type, other.outputs[0].shape = (
        ir.TensorType(ir.DataType.FLOAT),
        ir.Shape(["N", 32]),
    )
    model.graph.append(other)
    model.graph.outputs.append(other.outputs[0])
    after = quantized(model, 3, samples(model), method="awq", bits=8, accuracy_level=0)
    assert error(model, after) < 0.02
