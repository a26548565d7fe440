import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from effdl.graph import io
from effdl.graph.clean import clean
from effdl.graph.cost import model_cost
from effdl.graph.shapes import infer
from effdl.graph.weights import constant, weight_tensors
from effdl.passes.quantize.dynamic import QuantizeDynamic
from effdl.runtime.target import Target
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


def fill(text: str, seed: int = 0) -> ir.Model:
    """A model from text; declared values without a producer become random initializers."""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(seed)
    produced = {o for n in proto.graph.node for o in n.output}
    for value in [v for v in proto.graph.value_info if v.name not in produced]:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        array = (rng.standard_normal(shape) / np.sqrt(max(shape[0], 1))).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
        proto.graph.value_info.remove(value)
    return io.from_proto(proto, "text", None)


def fused_ops(model: ir.Model) -> dict[str, int]:
    """Count the nodes that ONNX Runtime really runs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(io.to_bytes(model), options)
        nodes = onnx.load(options.optimized_model_filepath).graph.node
    counts: dict[str, int] = {}
    for node in nodes:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def error(before: ir.Model, after: ir.Model) -> float:
    feed = feed_for(before, 7)
    pairs = zip(outputs(before, feed), outputs(after, feed), strict=True)
    return max(rel_l2(want, got) for want, got in pairs)


def quantized(model: ir.Model, expected: int, **options: object) -> ir.Model:
    after = model.clone()
    changes, log = run_pass(QuantizeDynamic(**options), after)
    assert changes == expected == len(log.touched)
    return after


ATTENTION = """<ir_version: 10, opset_import: ["": OPSET]>
g (float[N,S,64] x) => (float[N,S,64] y)
<float[64,64] wq, float[64,64] wk, float[64,64] wo, float[64] bq, float[64] bo> {
  q = MatMul(x, wq)
  qb = Add(q, bq)
  k = MatMul(x, wk)
  m = Mul(qb, k)
  o = MatMul(m, wo)
  y = Add(o, bo)
}"""


@pytest.mark.parametrize("opset", [11, 13, 14, 15, 16, 17, 18, 19, 20, 21])
def test_products_fuse_into_the_integer_kernels(opset: int) -> None:
    model = fill(ATTENTION.replace("OPSET", str(opset)))
    after = quantized(model, 3)
    assert op_counts(after)["DynamicQuantizeLinear"] == 2  # wq and wk share x
    ran = fused_ops(after)
    assert ran["MatMulIntegerToFloat"] == 2
    assert ran["DynamicQuantizeMatMul"] == 1
    assert not {"MatMul", "MatMulInteger", "Cast"} & set(ran)
    assert error(model, after) < 0.03
    assert [v.name for v in after.graph.outputs] == ["y"]


def test_weights_are_symmetric_int8_per_column() -> None:
    model = fill(ATTENTION.replace("OPSET", "17"))
    after = quantized(model, 3)
    ints = constant(after.graph.initializers["wq_quantized"])
    scale = constant(after.graph.initializers["wq_scale"])
    weight = constant(model.graph.initializers["wq"])
    assert ints is not None
    assert scale is not None
    assert weight is not None
    assert ints.dtype == np.int8
    assert scale.shape == (64,)
    np.testing.assert_allclose(ints * scale, weight, atol=float(scale.max()) * 0.51)
    one = quantized(model, 3, per_channel=False)
    scale = constant(one.graph.initializers["wq_scale"])
    assert scale is not None
    assert scale.shape == ()


def test_second_run_changes_nothing_and_bytes_repeat() -> None:
    model = fill(ATTENTION.replace("OPSET", "17"))
    after = quantized(model, 3)
    data = io.to_bytes(after)
    changes, log = run_pass(QuantizeDynamic(), after)
    assert changes == 0
    assert log.skipped == [("model", "the model is quantized already")]
    assert io.to_bytes(after) == data
    assert io.to_bytes(quantized(model, 3)) == data


@pytest.mark.parametrize(
    "attributes",
    ["", "<transB=1>", "<alpha=0.5>", "<beta=2.0>", "<alpha=-1.5, beta=0.25, transB=1>"],
)
def test_gemm_with_its_attributes(attributes: str) -> None:
    shape = "[32,128]" if "transB" in attributes else "[128,32]"
    model = fill(f"""<ir_version: 8, opset_import: ["": 13]>
        g (float[N,128] x) => (float[N,32] y) <float{shape} w, float[32] b> {{
          y = Gemm{attributes}(x, w, b)
        }}""")
    after = quantized(model, 1)
    assert error(model, after) < 0.02
    assert "Gemm" not in fused_ops(after)


def test_gemm_without_bias_and_with_a_computed_one() -> None:
    model = fill("""<ir_version: 8, opset_import: ["": 13]>
        g (float[4,128] x, float[4,32] c) => (float[4,32] y, float[4,32] z)
        <float[128,32] w, float[128,32] v> {
          y = Gemm(x, w)
          z = Gemm(x, v, c)
        }""")
    assert error(model, quantized(model, 2)) < 0.02


def test_embedding_rows_become_int8() -> None:
    model = fill("""<ir_version: 8, opset_import: ["": 13]>
        g (int64[N,S] ids) => (float[N,S,32] y) <float[500,32] table> { y = Gather(table, ids) }""")
    after = quantized(model, 1)
    rows = constant(after.graph.initializers["table_quantized"])
    assert rows is not None
    assert rows.dtype == np.int8
    assert error(model, after) < 0.01
    assert run_pass(QuantizeDynamic(), after)[0] == 0
    kept = model.clone()
    changes, log = run_pass(QuantizeDynamic(embeddings=False), kept)
    assert changes == 0
    assert "embeddings" in log.skipped[0][1]


def test_a_table_with_another_user_stays() -> None:
    model = fill("""<ir_version: 8, opset_import: ["": 13]>
        g (int64[N] ids) => (float[N,32] y, float[32,500] t) <float[500,32] table> {
          y = Gather(table, ids)
          t = Transpose(table)
        }""")
    changes, log = run_pass(QuantizeDynamic(), model)
    assert changes == 0
    assert log.skipped[0][1] == "its table is also used by Transpose"


def test_products_inside_branches_share_the_outer_weight() -> None:
    model = fill("""<ir_version: 8, opset_import: ["": 13]>
        g (bool c, float[2,128] x) => (float[2,64] y) <float[128,64] w> {
          y = If(c) <then_branch = t () => (float[2,64] a) { a = MatMul(x, w) },
                     else_branch = e () => (float[2,64] b) { n = Neg(x)
                                                            b = MatMul(n, w) }>
        }""")
    after = quantized(model, 2)
    assert [n for n in after.graph.initializers if "quantized" in n] == ["w_quantized"]
    for c in (True, False):
        feed = {**feed_for(model), "c": np.array(c)}
        assert rel_l2(outputs(model, feed)[0], outputs(after, feed)[0]) < 0.02


def test_weights_in_constant_nodes() -> None:
    values = np.random.default_rng(0).standard_normal(64 * 64).round(3)
    model = from_text(f"""<ir_version: 8, opset_import: ["": 13]>
        g (float[N,64] x) => (float[N,64] y) {{
          w = Constant<value = float[64,64] {{{", ".join(map(str, values))}}}>()
          y = MatMul(x, w)
        }}""")
    assert error(model, quantized(model, 1)) < 0.02


LEFT = {
    "less than min_size": """g (float[2,8] x) => (float[2,8] y) <float[8,8] w> {
        y = MatMul(x, w) }""",
    "quantize_static": """g (float[1,8,8,8] x) => (float[1,32,8,8] y) <float[32,8,1,1] w> {
        y = Conv(x, w) }""",
    "an activation": """g (float[2,8] x, float[8,4] z) => (float[2,4] y) { y = MatMul(x, z) }""",
    "transposed": """g (float[64,4] x) => (float[4,64] y) <float[64,64] w> {
        y = Gemm<transA=1>(x, w) }""",
    "3 dimensions": """g (float[2,8,64] x) => (float[2,8,64] y) <float[2,64,64] w> {
        y = MatMul(x, w) }""",
    "LSTM only": """g (float[5,1,16] x) => (float[5,1,1,32] y)
        <float[1,96,16] w, float[1,96,32] r> {
        y = GRU<hidden_size=32>(x, w, r) }""",
    "columns": """g (int64[3] i) => (float[64,3] y) <float[64,64] w> {
        y = Gather<axis=1>(w, i) }""",
}


@pytest.mark.parametrize("reason", LEFT)
def test_what_is_left_alone_is_named(reason: str) -> None:
    model = fill('<ir_version: 8, opset_import: ["": 13]>\n' + LEFT[reason])
    data = io.to_bytes(model)
    changes, log = run_pass(QuantizeDynamic(), model)
    assert changes == 0
    assert reason in log.skipped[0][1]
    assert io.to_bytes(model) == data


def test_nodes_of_functions_are_left_and_named() -> None:
    zeros = ", ".join(["0.5"] * 64 * 64)
    model = from_text(f"""<ir_version: 8, opset_import: ["": 13, "local": 1]>
        g (float[2,64] x) => (float[2,64] y) {{ y = local.f(x) }}
        <domain: "local", opset_import: ["": 13]>
        f (a) => (c) {{
          w = Constant<value = float[64,64] {{{zeros}}}>()
          c = MatMul(a, w)
        }}""")
    changes, log = run_pass(QuantizeDynamic(), model)
    assert changes == 0
    assert [why for _, why in log.skipped] == ["inside a function"]


def test_options_choose_nodes_and_candidates_tell() -> None:
    model = fill(ATTENTION.replace("OPSET", "17"))
    names = ("first", "second", "third")
    products = [n for n in model.graph if n.op_type == "MatMul"]
    for node, name in zip(products, names, strict=True):
        node.name = name
    assert QuantizeDynamic(ignore=("second",)).candidates(model, context()) == ["first", "third"]
    after = quantized(model, 1, targets=("second",))
    assert op_counts(after)["MatMul"] == 2


def test_cuda_is_declined() -> None:
    model = fill(ATTENTION.replace("OPSET", "17"))
    changes, log = run_pass(QuantizeDynamic(), model, target="cuda")
    assert changes == 0
    assert "convert_float16" in log.skipped[0][1]


def test_saturation_guard_follows_the_target() -> None:
    model = fill(ATTENTION.replace("OPSET", "17"))
    ctx = context()
    old = Target("cpu", "x86_64", frozenset({"avx2"}))
    QuantizeDynamic().run(model, type(ctx)(target=old, log=ctx.log))
    ints = constant(model.graph.initializers["wq_quantized"])
    assert ints is not None
    ordered = np.sort(ints.astype(int), axis=0)
    assert (ordered[-1] + ordered[-2]).max() <= 128
    assert (ordered[0] + ordered[1]).min() >= -128


def test_external_weights_are_mapped_and_let_go(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    source = fill(ATTENTION.replace("OPSET", "17"))
    io.save(source, file, external=True)
    model = io.load(file)
    after = quantized(model, 3)
    untouched = io.external_tensors(model)
    assert untouched
    assert all(t.raw is None for t in untouched)
    assert error(source, after) < 0.03


@pytest.mark.parametrize("name", ["digits_transformer", "digits_mlp"])
def test_sample_models_keep_their_answers(name: str) -> None:
    model = io.load(SAMPLES / f"{name}.onnx")
    test = np.load(SAMPLES / f"{name}.test.npz")
    key = model.graph.inputs[0].name or ""
    after = model.clone()
    assert run_pass(QuantizeDynamic(), after)[0] > 0
    feed = {key: test[key]}
    want, got = outputs(model, feed)[0].argmax(1), outputs(after, feed)[0].argmax(1)
    assert (want == got).mean() > 0.99


LSTM = """<ir_version: 8, opset_import: ["": 14]>
g (float[S,N,16] x, float[D,N,32] h, float[D,N,32] c)
=> (float[S,D,N,32] y, float[D,N,32] last, float[D,N,32] cell)
<float[D,128,16] w, float[D,128,32] r, float[D,256] b> {
  y, last, cell = LSTM<hidden_size=32, direction="DIRECTION">(x, w, r, b, , h, c)
}"""


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("direction", "count"), [("forward", 1), ("bidirectional", 2)])
def test_a_lstm(direction: str, count: int, per_channel: bool) -> None:
    text = (
        LSTM.replace("DIRECTION", direction)
        .replace("[D,", f"[{count},")
        .replace(",D,", f",{count},")
    )
    model = fill(text)
    after = quantized(model, 1, per_channel=per_channel)
    clean(after)
    assert op_counts(after) == {"DynamicQuantizeLSTM": 1}
    assert sum(t.nbytes for t in weight_tensors(after)) < 0.4 * sum(
        t.nbytes for t in weight_tensors(model)
    )
    feed = feed_for(model, 3, S=7, N=2)
    for want, got in zip(outputs(model, feed), outputs(after, feed), strict=True):
        assert 0 < rel_l2(want, got) < 0.08
    assert [v.name for v in after.graph.outputs] == ["y", "last", "cell"]
    sizes = {"S": 7, "N": 2}
    for output in after.graph.outputs:
        assert infer(after, sizes).static(output) == infer(model, sizes).static(output)
    assert model_cost(after, sizes).macs == model_cost(model, sizes).macs


def test_a_lstm_inside_a_branch_and_one_that_nobody_reads_in_full() -> None:
    model = fill(
        """<ir_version: 8, opset_import: ["": 14]>
        g (float[S,N,16] x, bool k) => (float[1,N,32] y) <float[1,128,16] w, float[1,128,32] r> {
            y = If (k) <
                then_branch = a () => (float[1,N,32] p) { o, p = LSTM<hidden_size=32>(x, w, r) },
                else_branch = b () => (float[1,N,32] q) {
                    o2, t = LSTM<hidden_size=32>(x, w, r)
                    q = Neg(t)
                }
            >
        }"""
    )
    after = quantized(model, 2)
    clean(after)
    feed = feed_for(model, 3, S=7, N=2)
    assert 0 < rel_l2(outputs(model, feed)[0], outputs(after, feed)[0]) < 0.08


def test_lstm_may_be_left_out() -> None:
    model = fill(LSTM.replace("DIRECTION", "forward").replace("[D,", "[1,").replace(",D,", ",1,"))
    quantized(model, 0, recurrent=False)
