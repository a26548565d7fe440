import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from effdl.solve import quantize as q


def ort_round_trip(
    x: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int
) -> tuple[np.ndarray, np.ndarray]:
    import onnxruntime as ort

    axes = {"axis": axis} if scale.ndim else {}
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **axes),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **axes),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [
            helper.make_tensor_value_info(
                "q", helper.np_dtype_to_tensor_dtype(zero.dtype), x.shape
            ),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape),
        ],
        [onnx.numpy_helper.from_array(scale, "s"), onnx.numpy_helper.from_array(zero, "z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    first, second = session.run(None, {"x": x})
    return first, second


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_quantize_is_onnx_runtimes_bit_by_bit(dtype: str) -> None:
    scale, zero = q.affine_parameters(-3.0, 5.0, dtype)
    halves = np.arange(-300, 300) * np.float64(scale) / 2  # ties, and far outside the range
    x = np.concatenate([halves, np.random.default_rng(0).normal(0, 3, 4000)]).astype(np.float32)
    ours = q.quantize(x, scale, zero, dtype)
    theirs, back = ort_round_trip(x, np.array(scale), np.array(zero, dtype), 0)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(q.dequantize(ours, scale, zero), back)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_per_axis_quantize_is_onnx_runtimes(axis: int) -> None:
    x = np.random.default_rng(1).normal(0, 2, (5, 6, 7)).astype(np.float32)
    scale = q.weight_scales(x, axis)
    zero = np.zeros(x.shape[axis], np.int8)
    ours = q.quantize(x, scale, zero, "int8", axis)
    theirs, back = ort_round_trip(x, scale, zero, axis)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(q.dequantize(ours, scale, zero, axis), back)


@pytest.mark.parametrize("axis", [0, 1])
def test_large_tensors_are_converted_in_blocks_with_the_same_result(
    axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.random.default_rng(2).normal(0, 2, (33, 17)).astype(np.float32)
    scale = q.weight_scales(x, axis)
    whole = q.quantize(x, scale, np.int8(0), "int8", axis)
    monkeypatch.setattr(q, "_BLOCK", 40)
    np.testing.assert_array_equal(q.quantize(x, scale, np.int8(0), "int8", axis), whole)


@given(
    st.floats(-1e6, 1e6, width=32),
    st.floats(-1e6, 1e6, width=32),
    st.sampled_from(["uint8", "int8"]),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_zero_is_exact_and_the_range_is_covered(
    a: float, b: float, dtype: str, symmetric: bool
) -> None:
    low, high = min(a, b), max(a, b)
    scale, zero = q.affine_parameters(low, high, dtype, symmetric=symmetric)
    assert scale > 0
    assert np.iinfo(dtype).min <= zero <= np.iinfo(dtype).max
    assert q.dequantize(q.quantize(np.zeros(1), scale, zero, dtype), scale, zero)[0] == 0
    ends = np.array([min(low, 0), max(high, 0)], np.float32)
    back = q.dequantize(q.quantize(ends, scale, zero, dtype), scale, zero)
    if np.abs(ends).max() > 1e-30:
        assert np.all(np.abs(back - ends) <= 1.01 * scale)


def test_symmetric_zero_point_is_the_middle() -> None:
    assert q.affine_parameters(-1, 2, "int8", symmetric=True)[1] == 0
    assert q.affine_parameters(-1, 2, "uint8", symmetric=True)[1] == 128


def test_a_channel_of_zeros_gets_a_usable_scale() -> None:
    weight = np.zeros((2, 3), np.float32)
    weight[1] = [1, -2, 3]
    scale = q.weight_scales(weight, 0)
    assert scale[0] == 1
    assert scale[1] == np.float32(3) / np.float32(127)


def test_mse_scales_are_not_worse_than_absmax_and_match_brute_force() -> None:
    weight = np.random.default_rng(3).standard_t(2, (6, 200)).astype(np.float32)

    def errors(scale: np.ndarray) -> np.ndarray:
        steps = np.clip(np.rint(weight / scale[:, None]), -127, 127)
        return ((steps * scale[:, None] - weight) ** 2).sum(axis=1)

    absmax = q.weight_scales(weight, 0)
    best = q.weight_scales(weight, 0, method="mse")
    assert np.all(errors(best) <= errors(absmax) * (1 + 1e-5))
    brute = np.min([errors(absmax * np.float32(c)) for c in np.linspace(1, 0.5, 51)], axis=0)
    np.testing.assert_allclose(errors(best), brute, rtol=1e-3)


def test_per_tensor_scale_is_a_scalar() -> None:
    weight = np.array([[1, -4], [2, 3]], np.float32)
    scale = q.weight_scales(weight, None)
    assert scale.shape == ()
    assert scale == np.float32(4) / np.float32(127)


def test_saturation_guard_keeps_every_pair_within_16_bits() -> None:
    weight = np.random.default_rng(4).normal(0, 1, (20, 40)).astype(np.float32)
    weight[0] = 0
    weight[0, 0] = 1  # one lone weight cannot overflow
    scale = q.weight_scales(weight, 0, saturation_guard=True)
    ints = q.quantize(weight, scale, np.int8(0), "int8", 0).astype(np.int64)
    worst = 0
    for row in ints:
        ordered = np.sort(row)
        worst = max(worst, 255 * max(ordered[-1] + ordered[-2], -(ordered[0] + ordered[1])))
    assert worst <= 32767
    assert scale[0] == q.weight_scales(weight, 0)[0]


def test_bias_is_int32_with_the_product_of_scales() -> None:
    bias = np.array([1.5, -2.0, 0.0], np.float32)
    scales = np.array([0.01, 0.02, 0.03], np.float32)
    ints, scale = q.quantize_bias(bias, 0.5, scales)
    assert ints.dtype == np.int32
    np.testing.assert_array_equal(scale, np.float32(0.5) * scales)
    np.testing.assert_allclose(ints * scale, bias, atol=float(scale.max()) / 2)


def test_floor_keeps_the_bias_of_a_dead_channel_from_overflowing() -> None:
    bias = np.array([3.0, 3.0], np.float32)
    scales = np.array([1e-12, 1e-2], np.float32)
    floor = q.bias_scale_floor(bias, 0.1)
    raised = np.maximum(scales, floor)
    assert raised[0] > scales[0]
    assert raised[1] == scales[1]
    ints, scale = q.quantize_bias(bias, 0.1, raised)
    assert np.abs(ints.astype(np.int64)).max() <= 2**30 + 64
    np.testing.assert_allclose(ints * scale.astype(np.float64), bias, rtol=1e-3)
