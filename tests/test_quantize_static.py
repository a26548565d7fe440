from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from effdl import passes
from effdl.data.feeds import Feeds
from effdl.data.npz import load_npz
from effdl.errors import DataError
from effdl.graph import io
from effdl.graph.weights import constant
from effdl.passes.quantize._format import choose, decline
from effdl.passes.quantize.static import QuantizeStatic
from effdl.runtime.target import Target, parse_target
from tests.support import (
    SAMPLES,
    context,
    feed_for,
    from_text,
    op_counts,
    outputs,
    rel_l2,
    run_pass,
)

NET = """<ir_version: 8, opset_import: ["": OPSET]>
g (float[N,3,16,16] x) => (float[N,10] y)
<float[16,3,3,3] w1, float[16] b1, float[16,16,3,3] w2, float[16] b2, float[16,16,1,1] w3,
 float[16,1,3,3] wd, float[10,1024] wg, float[10] bg, float zero, float six> {
  c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
  r1 = Relu(c1)
  c2 = Conv<pads=[1,1,1,1]>(r1, w2, b2)
  c3 = Conv(r1, w3)
  s = Add(c2, c3)
  r2 = Relu(s)
  d = Conv<pads=[1,1,1,1], group=16>(r2, wd)
  k = Clip(d, zero, six)
  p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(k)
  f = Flatten(p)
  y = Gemm<transB=1>(f, wg, bg)
}"""


def fill(text: str, seed: int = 0) -> ir.Model:
    """A model from text whose initializers get random values (``zero`` and ``six`` their own)."""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(seed)
    fixed = {"zero": 0.0, "six": 6.0}
    # The parser keeps declared names as value_info: turn them into initializers.
    made = [v for v in proto.graph.value_info if not _produced(proto, v.name)]
    for value in made:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        array = rng.standard_normal(shape) / max(np.sqrt(np.prod(shape[1:])), 1)
        array = np.array(fixed.get(value.name, array), np.float32).reshape(shape)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
        proto.graph.value_info.remove(value)
    return io.from_proto(proto, "text", None)


def _produced(proto: onnx.ModelProto, name: str) -> bool:
    return any(name in n.output for n in proto.graph.node)


def net(opset: int = 17) -> ir.Model:
    return fill(NET.replace("OPSET", str(opset)))


def feeds_of(model: ir.Model, count: int = 8) -> Feeds:
    return Feeds(tuple(feed_for(model, seed) for seed in range(count)), "random", False)


def fused_ops(model: ir.Model) -> dict[str, int]:
    """Count the nodes that ONNX Runtime really runs."""
    import tempfile
    from pathlib import Path

    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    # The layout for 8-bit kernels comes last: its nodes have the same names in another domain.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(file)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        ort.InferenceSession(io.to_bytes(model), options)
        nodes = onnx.load(file).graph.node
    counts: dict[str, int] = {}
    for node in nodes:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def quantized(model: ir.Model, **options: object) -> ir.Model:
    after = model.clone()
    changes, _ = run_pass(QuantizeStatic(**options), after, feeds=feeds_of(model))
    assert changes > 0
    return after


def error(before: ir.Model, after: ir.Model) -> float:
    feed = feed_for(before, 99)
    pairs = zip(outputs(before, feed), outputs(after, feed), strict=True)
    return max(rel_l2(want, got) for want, got in pairs)


@pytest.mark.parametrize("opset", [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21])
def test_a_cnn_becomes_8_bit_throughout(opset: int) -> None:
    model = net(opset)
    after = quantized(model)
    assert error(model, after) < 0.05
    ran = fused_ops(after)
    assert ran["QLinearConv"] == 4
    assert ran["QLinearAdd"] == 1
    assert ran["QGemm"] == 1
    assert ran["QuantizeLinear"] == 1
    assert not {"Conv", "Gemm", "Relu", "Clip", "DequantizeLinear", "Add"} & set(ran)


def test_types_are_those_of_the_target() -> None:
    model = net()
    changes, log = run_pass(QuantizeStatic(), model, feeds=feeds_of(model), target="cpu")
    assert changes == 8
    native = "int8" if parse_target("cpu").arch == "arm64" else "uint8"
    assert log.notes["activation_type"] == native
    weights = [v for n, v in model.graph.initializers.items() if n.startswith("w1_quantized")]
    assert [v.dtype for v in weights] == [ir.DataType.INT8]
    scale = constant(model.graph.initializers["w1_scale"])
    assert scale is not None
    assert scale.shape == (16,)


def test_arm_gets_int8_and_the_model_still_runs_here() -> None:
    model = net()
    after = model.clone()
    changes, log = run_pass(QuantizeStatic(), after, feeds=feeds_of(model), target="arm")
    assert changes == 8
    assert log.notes["activation_type"] == "int8"
    assert error(model, after) < 0.05
    # How many kernels fuse shows on Arm only; that the activations are absorbed shows here too.
    assert not {"Relu", "Clip"} & set(fused_ops(after))


def test_format_follows_the_instruction_set() -> None:
    vnni = Target("cpu", "x86_64", frozenset({"avx512_vnni"}))
    old = Target("cpu", "x86_64", frozenset({"avx2"}))
    arm = Target("arm", "arm64", frozenset({"dotprod"}))
    assert (choose(vnni).activation_type, choose(vnni).saturation_guard) == ("uint8", False)
    assert (choose(old).activation_type, choose(old).saturation_guard) == ("uint8", True)
    assert (choose(arm).activation_type, choose(arm).saturation_guard) == ("int8", False)
    assert not choose(old, reduce_range=False).saturation_guard
    assert choose(vnni, activation_type="int8").activation_type == "int8"
    assert "convert_float16" in decline(parse_target("cuda"))
    assert decline(vnni) == ""


def test_reduced_range_bounds_neighbouring_weights() -> None:
    after = quantized(net(), reduce_range=True)
    weight = constant(after.graph.initializers["w2_quantized"])
    assert weight is not None
    rows = np.sort(weight.reshape(16, -1).astype(int), axis=1)
    assert max((rows[:, -1] + rows[:, -2]).max(), -(rows[:, 0] + rows[:, 1]).min()) <= 128
    assert error(net(), after) < 0.07


def test_interface_stays_and_the_second_run_changes_nothing() -> None:
    model = net()
    after = quantized(model)
    assert [v.name for v in after.graph.inputs] == ["x"]
    assert [str(v.shape) for v in after.graph.outputs] == [
        str(v.shape) for v in model.graph.outputs
    ]
    data = io.to_bytes(after)
    changes, log = run_pass(QuantizeStatic(), after, feeds=feeds_of(model))
    assert changes == 0
    assert log.skipped == [("model", "the model is quantized already")]
    assert io.to_bytes(after) == data


def test_same_input_gives_the_same_bytes() -> None:
    assert io.to_bytes(quantized(net())) == io.to_bytes(quantized(net()))


def test_candidates_are_what_a_run_touches() -> None:
    model = net()
    expected = QuantizeStatic().candidates(model, context())
    _, log = run_pass(QuantizeStatic(), model, feeds=feeds_of(model))
    assert [name for name, _ in log.touched] == expected


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
def test_every_calibration_method_keeps_the_outputs(method: str) -> None:
    assert error(net(), quantized(net(), calibration_method=method)) < 0.12


@pytest.mark.parametrize(
    "options",
    [
        {"per_channel": False},
        {"weight_method": "mse"},
        {"symmetric_activations": True},
        {"activation_type": "int8"},
        {"weight_type": "uint8"},
        {"activation_type": "int8", "symmetric_activations": True},
    ],
)
def test_options_give_working_models(options: dict[str, object]) -> None:
    assert error(net(), quantized(net(), **options)) < 0.1


def test_options_choose_nodes() -> None:
    model = net()
    step = QuantizeStatic(ignore=("Gemm",), op_types=("Conv", "Gemm"))
    _, log = run_pass(step, model, feeds=feeds_of(model))
    assert {what.split()[0] for _, what in log.touched} == {"Conv"}
    assert any(reason == "left out by the options" for _, reason in log.skipped)


def test_a_convolution_at_the_output_keeps_the_name() -> None:
    model = fill("""<ir_version: 8, opset_import: ["": 13]>
        g (float[1,8,6,6] x) => (float[1,8,6,6] y, float[1,8,6,6] r) <float[8,8,3,3] w> {
          y = Conv<pads=[1,1,1,1]>(x, w)
          r = Relu(y)
        }""")
    after = quantized(model)
    assert [v.name for v in after.graph.outputs] == ["y", "r"]
    assert error(model, after) < 0.03
    assert fused_ops(after)["QLinearConv"] == 1


def test_shared_weights_are_stored_once() -> None:
    model = fill("""<ir_version: 8, opset_import: ["": 13]>
        g (float[1,8,6,6] x) => (float[1,8,6,6] y) <float[8,8,3,3] w> {
          a = Conv<pads=[1,1,1,1]>(x, w)
          y = Conv<pads=[1,1,1,1]>(a, w)
        }""")
    after = quantized(model)
    ints = [v for v in after.graph.initializers.values() if v.dtype == ir.DataType.INT8]
    assert sum(len(v.shape or ()) == 4 for v in ints) == 1
    assert error(model, after) < 0.05


def test_weights_in_constant_nodes() -> None:
    values = np.random.default_rng(0).standard_normal(64 * 8).round(3)
    text = f"""<ir_version: 8, opset_import: ["": 13]>
        g (float[N,64] x) => (float[N,8] y) {{
          w = Constant<value = float[64,8] {{{", ".join(map(str, values))}}}>()
          m = MatMul(x, w)
          y = Relu(m)
        }}"""
    model = from_text(text)
    after = quantized(model)
    assert error(model, after) < 0.03
    assert "MatMulIntegerToFloat" in fused_ops(after)


def test_concat_and_resize_share_scales() -> None:
    model = fill("""<ir_version: 8, opset_import: ["": 13]>
        g (float[1,8,8,8] x) => (float[1,8,16,16] y)
        <float[8,8,3,3] w1, float[8,8,3,3] w2, float[8,16,3,3] w3, float[4] scales> {
          a = Conv<pads=[1,1,1,1]>(x, w1)
          ra = Relu(a)
          b = Conv<pads=[1,1,1,1]>(x, w2)
          rb = Relu(b)
          c = Concat<axis=1>(ra, rb)
          u = Resize<mode="nearest">(c, , scales)
          y = Conv<pads=[1,1,1,1]>(u, w3)
        }""")
    model.graph.initializers["scales"].const_value = ir.tensor(
        np.array([1, 1, 2, 2], np.float32), name="scales"
    )
    after = quantized(model)
    scales = {
        node.inputs[1].name
        for node in after.graph
        if node.op_type == "QuantizeLinear" and node.inputs[0].name in ("ra", "rb", "c", "u")
    }
    assert len(scales) == 1
    assert error(model, after) < 0.05
    assert not {"Concat", "Conv", "Relu"} & set(fused_ops(after))


def test_silu_stays_8_bit() -> None:
    model = fill("""<ir_version: 8, opset_import: ["": 13]>
        g (float[1,8,8,8] x) => (float[1,8,8,8] y) <float[8,8,3,3] w1, float[8,8,3,3] w2> {
          a = Conv<pads=[1,1,1,1]>(x, w1)
          s = Sigmoid(a)
          m = Mul(a, s)
          y = Conv<pads=[1,1,1,1]>(m, w2)
        }""")
    after = quantized(model)
    ran = fused_ops(after)
    assert ran["QLinearSigmoid"] == ran["QLinearMul"] == 1
    assert error(model, after) < 0.05


def test_elementwise_islands_stay_float() -> None:
    model = fill("""<ir_version: 8, opset_import: ["": 13]>
        g (float[1,8,8,8] x, float[1,8,8,8] z) => (float[1,8,8,8] y, float[1,8,4,4] p)
        <float[8,1,3,3] w> {
          a = Add(x, z)
          s = Sigmoid(a)
          t = Mul(a, s)
          e = Exp(t)
          y = Conv<pads=[1,1,1,1], group=8>(e, w)
          p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)
        }""")
    data = io.to_bytes(model)
    changes, log = run_pass(QuantizeStatic(), model, feeds=feeds_of(model))
    assert changes == 0
    assert io.to_bytes(model) == data
    assert log.skipped[0][1].startswith("small, and no 8-bit neighbour")


def test_gemm_before_a_float_activation_does_not_dequantize_weights_at_run_time() -> None:
    model = fill("""<ir_version: 8, opset_import: ["": 13]>
        g (float[N,64] x) => (float[N,32] y) <float[64,32] w, float[32] b> {
          m = Gemm(x, w, b)
          r = Relu(m)
          y = Exp(r)
        }""")
    ran = fused_ops(quantized(model))
    assert ran["QGemm"] == 1
    assert "FusedGemm" not in ran


def test_matmul_before_an_add_does_not_dequantize_weights_at_run_time() -> None:
    model = fill("""<ir_version: 8, opset_import: ["": 13]>
        g (float[N,64] x) => (float[N,32] y) <float[64,32] w, float[32] b> {
          m = MatMul(x, w)
          y = Add(m, b)
        }""")
    after = quantized(model)
    ran = fused_ops(after)
    assert ran["QLinearMatMul"] == 1
    assert "Gemm" not in ran
    assert error(model, after) < 0.03


def test_layer_norm_bias_and_residual_stay_float() -> None:
    model = fill("""<ir_version: 8, opset_import: ["": 17]>
        g (float[N,5,64] x) => (float[N,5,64] y) <float[64,64] w, float[64] b, float[64] s, float[64] t> {
          m = MatMul(x, w)
          a = Add(m, b)
          r = Add(a, x)
          y = LayerNormalization(r, s, t)
        }""")
    after = quantized(model)
    assert op_counts(after)["QuantizeLinear"] == 1
    assert fused_ops(after)["MatMulIntegerToFloat"] == 1
    assert error(model, after) < 0.02


DECLINED = {
    "BatchNormalization": """g (float[1,8,8,8] x) => (float[1,8,8,8] y)
        <float[8,8,3,3] w, float[8] s, float[8] b, float[8] m, float[8] v> {
          c = Conv<pads=[1,1,1,1]>(x, w)
          y = BatchNormalization(c, s, b, m, v) }""",
    "ConvTranspose": """g (float[1,8,8,8] x) => (float[1,8,10,10] y) <float[8,8,3,3] w> {
          y = ConvTranspose(x, w) }""",
    "weight is computed": """g (float[1,8,8,8] x, float[8,8,3,3] w) => (float[1,8,6,6] y) {
          y = Conv(x, w) }""",
    "alpha, beta or transA": """g (float[64,4] x) => (float[4,8] y) <float[64,8] w> {
          y = Gemm<transA=1>(x, w) }""",
    "subgraph": """g (bool c, float[2,64] x) => (float[2,8] y) <float[64,8] w> {
          y = If(c) <then_branch = t () => (float[2,8] a) { a = MatMul(x, w) },
                     else_branch = e () => (float[2,8] b) { b = MatMul(x, w) }> }""",
    "not known to be float32": """g (double[2,64] x) => (double[2,8] y) <double[64,8] w> {
          y = MatMul(x, w) }""",
}


@pytest.mark.parametrize("reason", DECLINED)
def test_what_is_left_alone_is_named(reason: str) -> None:
    head = '<ir_version: 8, opset_import: ["": 13]>\n'
    text = DECLINED[reason].replace("<double[64,8] w>", "")
    text = text.replace("(double[2,64] x)", "(double[2,64] x, double[64,8] w)")
    model = fill(head + text)
    data = io.to_bytes(model)
    changes, log = run_pass(QuantizeStatic(), model, feeds=feeds_of(model))
    assert changes == 0
    assert any(reason in why or (reason in name) for name, why in log.skipped), log.skipped
    assert io.to_bytes(model) == data


def test_cuda_and_float16_are_declined_as_a_whole() -> None:
    model = net()
    ctx = context(feeds_of(model), target="cuda")
    assert QuantizeStatic().run(model, ctx) == 0
    assert "convert_float16" in ctx.log.skipped[0][1]
    half = from_text("""<ir_version: 8, opset_import: ["": 13]>
        g (float16[2,4] x) => (float16[2,4] y) { y = Relu(x) }""")
    _, log = run_pass(QuantizeStatic(), half, feeds=feeds_of(half))
    assert "float16" in log.skipped[0][1]


def test_values_that_are_not_finite_keep_their_nodes_float() -> None:
    model = fill("""<ir_version: 8, opset_import: ["": 13]>
        g (float[N,64] x) => (float[N,32] y, float[N,32] z)
        <float[64,32] w, float[64,32] v> {
          l = Log(x)
          y = MatMul(l, w)
          z = MatMul(x, v)
        }""")
    changes, log = run_pass(QuantizeStatic(), model, feeds=feeds_of(model))
    assert changes == 1
    assert [why for _, why in log.skipped] == ["a value is not finite on the data"]


def test_data_is_needed() -> None:
    with pytest.raises(DataError, match="calibration data"):
        run_pass(QuantizeStatic(), net())


def test_external_weights_are_read_one_by_one(tmp_path: object) -> None:
    from pathlib import Path

    file = Path(str(tmp_path)) / "m.onnx"
    io.save(net(), file, external=True)
    model = io.load(file)
    after = quantized(model)
    assert io.to_bytes(after) == io.to_bytes(quantized(model))
    assert error(net(), after) < 0.05


def test_sample_cnn_without_batch_norm_layers_keeps_its_answers() -> None:
    model = io.load(SAMPLES / "digits_mlp.onnx")
    calibration = np.load(SAMPLES / "digits_mlp.calib.npz")["image"]
    test = np.load(SAMPLES / "digits_mlp.test.npz")
    batches = tuple({"image": calibration[i : i + 8]} for i in range(0, len(calibration), 8))
    after = model.clone()
    changes, _ = run_pass(QuantizeStatic(), after, feeds=Feeds(batches, "calib", True))
    assert changes == 3
    feed = {"image": test["image"]}
    want, got = outputs(model, feed)[0].argmax(1), outputs(after, feed)[0].argmax(1)
    assert (want == got).mean() > 0.99


POSITIVE = """<ir_version: 8, opset_import: ["": 13]>
g (float[N,8,10,10] x) => (float[N,16,10,10] y, float[N,12] z)
<float[16,4,3,3] w, float[16] b, float[12,1600] wz, float[12] bz> {
  y = Conv<group = 2, pads = [1,1,1,1]>(x, w, b)
  flat = Flatten(y)
  z = Gemm<transB = 1>(flat, wz, bz)
}"""


def test_biases_take_back_what_rounding_does_to_the_mean() -> None:
    model = fill(POSITIVE)
    rng = np.random.default_rng(5)
    data = [{"x": rng.uniform(0.5, 1.5, (4, 8, 10, 10)).astype(np.float32)} for _ in range(8)]
    feeds = Feeds(data, "test", True)
    shifts = {}
    for corrected in (True, False):
        after = model.clone()
        options = {"per_channel": False, "reduce_range": True, "bias_correction": corrected}
        changes, _ = run_pass(QuantizeStatic(**options), after, feeds=feeds)
        assert changes >= 2
        pairs = [(outputs(model, feed), outputs(after, feed)) for feed in data]
        change = np.stack([got[0] - want[0] for want, got in pairs])
        shifts[corrected] = np.abs(change.mean((0, 1, 3, 4))).mean()
    assert shifts[True] < 0.4 * shifts[False]


def test_an_old_model_of_which_nothing_becomes_8_bit_stays_as_old() -> None:
    model = net(11)
    before = io.to_bytes(model)
    data = [{"x": np.full((1, 3, 16, 16), np.inf, np.float32)} for _ in range(2)]
    changes, log = run_pass(QuantizeStatic(), model, feeds=Feeds(data, "test", True))
    assert changes == 0
    assert io.to_bytes(model) == before
    assert any("not finite" in why for _, why in log.skipped)


def test_steps_with_other_options_do_not_share_what_they_found() -> None:
    """The memo of a model holds what was seen; ranges are chosen anew where the options differ."""
    model = io.load(SAMPLES / "digits_cnn.onnx")
    feeds = load_npz(SAMPLES / "digits_cnn.calib.npz", model, batch=10)
    memo: dict[object, object] = {}

    def made(step: QuantizeStatic, shared: dict[object, object]) -> bytes:
        copy = model.clone()
        step.run(copy, replace(context(feeds), memo=shared))
        return io.to_bytes(copy)

    first = made(QuantizeStatic(), memo)
    assert made(QuantizeStatic(), memo) == first
    other = QuantizeStatic(calibration_method="minmax", symmetric_activations=True)
    assert made(other, memo) == made(other, {})


def test_tensorrt_takes_symmetric_pairs_at_the_inputs_of_layers() -> None:
    """Nothing between a layer and its Relu, biases in float, and of a sum only the side that is not fused."""
    model = net()
    ctx = context(feeds_of(model), target="tensorrt")
    after = model.clone()
    assert QuantizeStatic().run(after, ctx) > 0
    assert "TensorRT" in str(ctx.log.notes["format_reason"])
    io.check(after)
    made = {o.name: n for n in after.graph for o in n.outputs}
    for node in after.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = constant(node.inputs[2])
            assert zero is not None
            assert zero.dtype == np.int8
            assert not zero.any()
        elif node.op_type in ("Conv", "Gemm"):
            assert node.inputs[0] is not None
            assert made[node.inputs[0].name].op_type == "DequantizeLinear"
            assert len(node.inputs) < 3 or constant(node.inputs[2]) is not None
        elif node.op_type in ("Relu", "Clip", "Flatten"):
            assert made[node.inputs[0].name or ""].op_type not in ("DequantizeLinear",)
        elif node.op_type == "Add":
            sides = [made[v.name or ""].op_type for v in node.inputs if v is not None]
            assert sorted(sides) == ["Conv", "DequantizeLinear"]
    assert op_counts(after)["MaxPool"] == 1
    assert error(model, after) < 0.05
    dynamic = context(feeds_of(model), target="tensorrt")
    assert passes.get("quantize_dynamic")().run(model.clone(), dynamic) == 0
    assert "quantize_static" in dynamic.log.skipped[0][1]


def test_tensorrt_leaves_biases_and_plain_sums_alone() -> None:
    model = fill(
        """<ir_version: 8, opset_import: ["": 13]> g (float[N,40] x) => (float[N,48] y)
        <float[40,48] w, float[48] b1, float[48] k> {
          m = MatMul(x, w)  a = Add(m, b1)  r = Relu(a)  y = Add(r, k) }"""
    )
    assert QuantizeStatic().run(model, context(feeds_of(model), target="tensorrt")) == 1
    for node in model.graph:
        if node.op_type == "Add":
            assert any(constant(v) is not None for v in node.inputs)


def test_tensorrt_with_a_layer_whose_input_is_not_finite() -> None:
    model = fill(
        """<ir_version: 8, opset_import: ["": 13]> g (float[N,4,8,8] x) => (float[N,4,8,8] y)
        <float[4,4,1,1] w1, float[4,4,1,1] w2> {
          l = Log(x)  a = Conv(l, w1)  c = Conv(x, w2)  s = Add(a, x)  t = Add(a, c)  y = Add(s, t) }"""
    )
    ctx = context(feeds_of(model), target="tensorrt")
    assert QuantizeStatic().run(model, ctx) >= 1
    assert any("not finite" in reason for _, reason in ctx.log.skipped)
