import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from pydantic import ValidationError

from effdl.graph import io, shapes
from effdl.passes._low_rank_layer import MARK
from effdl.passes.low_rank import LowRank
from effdl.passes.strip_metadata import StripMetadata
from effdl.runtime.target import parse_target
from tests.support import (
    SAMPLES,
    SHARED,
    assert_same,
    context,
    feed_for,
    from_text,
    needs_shared,
    op_counts,
    outputs,
    rel_l2,
    run_pass,
)
from tests.weighted import normal, weight, weighted

HEAD = '<ir_version: 8, opset_import: ["": 17]>\n'


def low(rows: int, columns: int, rank: int, seed: int = 0) -> np.ndarray:
    """A matrix of exactly that rank, with entries of about 1."""
    a, b = normal(rows, rank, seed=seed), normal(rank, columns, seed=seed + 1)
    return (a @ b / np.sqrt(rank)).astype(np.float32)


def conv_weight(outputs: int, inputs: int, *kernel: int, rank: int, by_input: bool) -> np.ndarray:
    """A kernel that factors exactly through ``rank`` channels before or behind it."""
    size = int(np.prod(kernel))
    if by_input:
        w = low(inputs, outputs * size, rank).reshape(inputs, outputs, *kernel)
        return np.ascontiguousarray(np.moveaxis(w, 0, 1))
    return low(outputs, inputs * size, rank).reshape(outputs, inputs, *kernel)


def check_again(step: LowRank, model: ir.Model) -> None:
    before = io.to_bytes(model)
    changes, log = run_pass(step, model)
    assert changes == 0
    assert not log.touched
    assert io.to_bytes(model) == before


def check_exact(model: ir.Model, *, layers: int = 1, **dims: int) -> ir.Model:
    """A layer of low rank is replaced and computes the same; return the model after the pass."""
    before = model.clone()
    step = LowRank(energy=1 - 1e-9, multiple_of=1)
    changes, log = run_pass(step, model)
    assert changes == layers, log.skipped
    assert_same(before, model, rtol=1e-3, atol=1e-3, **dims)
    assert [o.name for o in model.graph.outputs] == [o.name for o in before.graph.outputs]
    for ours, theirs in zip(model.graph.outputs, before.graph.outputs, strict=True):
        assert ours.type == theirs.type
        assert ours.shape == theirs.shape
    check_again(step, io.load_bytes(io.to_bytes(model)))
    return model


def test_matmul_with_the_weight_behind() -> None:
    model = weighted(
        HEAD + "g (float[N,7,40] x, float[40,48] W) => (float[N,7,48] y) { [m] y = MatMul(x, W) }",
        W=low(40, 48, 5),
    )
    check_exact(model, N=3)
    assert [n.name for n in model.graph] == ["m/lr_a", "m/lr_b"]
    assert weight(model, "W/lr_a").shape == (40, 5)
    assert weight(model, "W/lr_b").shape == (5, 48)
    hidden = next(iter(model.graph)).outputs[0]
    assert hidden.shape == ir.Shape(["N", 7, 5])
    assert all(n.metadata_props[MARK] == "5" for n in model.graph)


@pytest.mark.parametrize("x", ["2,40,6", "40,6", "40"])
def test_matmul_with_the_weight_before(x: str) -> None:
    y = x.replace("40", "48")
    model = weighted(
        HEAD + f"g (float[{x}] x, float[48,40] W) => (float[{y}] y) {{ [m] y = MatMul(W, x) }}",
        W=low(48, 40, 5),
    )
    check_exact(model)
    hidden = next(iter(model.graph)).outputs[0]
    assert hidden.shape == ir.Shape([5 if d == "40" else int(d) for d in x.split(",")])
    assert shapes.infer(model).static(hidden) == hidden.shape.numpy()


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", ["", ", c"])
def test_gemm(trans_b: int, bias: str) -> None:
    shape = "48,40" if trans_b else "40,48"
    w = low(40, 48, 6)
    model = weighted(
        HEAD
        + f"g (float[N,40] x, float[{shape}] W, float[48] c) => (float[N,48] y) {{"
        + f"[fc] y = Gemm<alpha=0.5, beta=2.0, transB={trans_b}>(x, W{bias}) }}",
        W=np.ascontiguousarray(w.T) if trans_b else w,
        c=normal(48),
    )
    check_exact(model)
    assert op_counts(model) == {"MatMul": 1, "Gemm": 1}


CONVS = [
    ("", (9, 9), (9, 9), (3, 3)),
    ("pads=[1,2,0,1]", (9, 9), (8, 10), (3, 3)),
    ("strides=[2,3], pads=[1,1,1,1]", (9, 9), None, (3, 3)),
    ("dilations=[2,1]", (9, 9), None, (3, 3)),
    ('auto_pad="SAME_UPPER", strides=[2,2]', (9, 8), None, (3, 3)),
    ('auto_pad="SAME_LOWER"', (9, 8), None, (3, 2)),
    ("strides=[2]", (17,), None, (5,)),
    ("pads=[1,0,1,1,0,1]", (5, 5, 5), None, (3, 2, 3)),
]


@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize(("attributes", "size", "_", "kernel"), CONVS)
def test_convolution(
    attributes: str, size: tuple[int, ...], _: object, kernel: tuple[int, ...], by_input: bool
) -> None:
    channels = (24, 12) if by_input else (12, 24)
    dims = ",".join(map(str, size))
    anonymous = ",".join("HWD"[: len(size)])
    shape = ",".join(map(str, (channels[1], channels[0], *kernel)))
    model = weighted(
        HEAD
        + f"g (float[2,{channels[0]},{dims}] x, float[{shape}] W, float[{channels[1]}] b)"
        + f" => (float[2,{channels[1]},{anonymous}] y) {{ [c] y = Conv"
        + (f"<{attributes}>" if attributes else "")
        + "(x, W, b) }",
        W=conv_weight(channels[1], channels[0], *kernel, rank=3, by_input=by_input),
        b=normal(channels[1]),
    )
    check_exact(model)
    first, second = list(model.graph)
    assert [n.name for n in (first, second)] == ["c/lr_a", "c/lr_b"]
    ones = tuple(1 for _ in kernel)
    assert weight(model, f"W/lr_{'a' if by_input else 'b'}").shape[2:] == ones
    assert second.inputs[2] is not None
    assert len(first.inputs) == 2
    hidden = first.outputs[0]
    assert hidden.shape is not None
    got = outputs_of(model, hidden)
    assert tuple(hidden.shape.numpy()) == got.shape


def outputs_of(model: ir.Model, value: ir.Value) -> np.ndarray:
    """The value computed by ONNX Runtime."""
    probe = model.clone()
    inner = next(v for n in probe.graph for v in n.outputs if v.name == value.name)
    probe.graph.outputs.append(inner)
    return outputs(probe, feed_for(probe), optimize=False)[-1]


@pytest.mark.parametrize("stride", [1, 2])
def test_pointwise_convolution_becomes_two(stride: int) -> None:
    model = weighted(
        HEAD
        + "g (float[1,40,6,6] x, float[36,40,1,1] W) => (float[1,36,H,W_] y) {"
        + f"[c] y = Conv<strides=[{stride},{stride}]>(x, W) }}",
        W=conv_weight(36, 40, 1, 1, rank=4, by_input=False),
    )
    check_exact(model)
    assert weight(model, "W/lr_a").shape == (4, 40, 1, 1)


def test_the_side_with_fewer_macs_is_taken() -> None:
    # At equal rank, the kernel on the narrow side: 1x1 first when there are more inputs than outputs.
    for channels, expected in ((64, 16), "before"), ((16, 64), "after"):
        model = weighted(
            HEAD
            + f"g (float[1,{channels[0]},8,8] x, float[{channels[1]},{channels[0]},3,3] W)"
            + f" => (float[1,{channels[1]},6,6] y) {{ y = Conv(x, W) }}",
            W=normal(channels[1], channels[0], 3, 3),
        )
        _, log = run_pass(LowRank(ratio=0.5, multiple_of=1), model)
        assert f"1x1 {expected} the kernel" in log.touched[0][1]


def test_energy_sets_the_rank_and_the_error_is_told() -> None:
    u, _ = np.linalg.qr(normal(64, 64))
    v, _ = np.linalg.qr(normal(64, 64, seed=1))
    s = np.sqrt(np.array([6.0, 3.0, 0.5, 0.5] + [0.0] * 60))
    w = ((u * s) @ v).astype(np.float32)
    text = HEAD + "g (float[N,64] x, float[64,64] W) => (float[N,64] y) { [m] y = MatMul(x, W) }"
    for energy, rank in ((0.5, 1), (0.9, 2), (0.94, 3), (0.99, 4)):
        model = weighted(text, W=w)
        changes, log = run_pass(LowRank(energy=energy, multiple_of=1), model)
        assert changes == 1
        a, b = weight(model, "W/lr_a"), weight(model, "W/lr_b")
        assert a.shape == (64, rank)
        error = rel_l2(w, a @ b)
        assert error == pytest.approx(np.sqrt(max(0, 1 - (s[:rank] ** 2).sum() / 10)), abs=1e-6)
        assert f"weight error {error:.2%}" in log.touched[0][1]
        assert log.notes["macs_saved"] == 64 * 64 - rank * 128
        np.testing.assert_allclose(np.abs(a).max(0), np.abs(b).max(1), rtol=1e-4)
    model = weighted(text, W=w)
    run_pass(LowRank(energy=0.9, multiple_of=8), model)
    assert weight(model, "W/lr_a").shape == (64, 8)
    model = weighted(text, W=w)
    run_pass(LowRank(energy=0.9, multiple_of=1, min_rank=7), model)
    assert weight(model, "W/lr_a").shape == (64, 7)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
def test_ratio_is_kept(ratio: float) -> None:
    text = HEAD + "g (float[5,96] x, float[96,80] W) => (float[5,80] y) { [m] y = MatMul(x, W) }"
    model = weighted(text, W=normal(96, 80))
    before = model.clone()
    _, log = run_pass(LowRank(ratio=ratio, multiple_of=1), model)
    rank = weight(model, "W/lr_a").shape[1]
    assert rank * 176 <= ratio * 96 * 80 < (rank + 1) * 176
    assert log.notes["macs_saved"] == 5 * (96 * 80 - rank * 176)
    assert log.notes["params_saved"] == 96 * 80 - rank * 176
    feed = feed_for(before)
    error = rel_l2(outputs(before, feed)[0], outputs(model, feed)[0])
    assert error == pytest.approx(float(log.notes["largest_error"]), rel=0.3)


def test_ratio_rounds_to_the_nearest_multiple_that_saves_enough() -> None:
    text = HEAD + "g (float[5,128] x, float[128,128] W) => (float[5,128] y) { y = MatMul(x, W) }"
    for ratio, rank in ((0.5, 32), (0.45, 32), (0.8, 48), (0.9, 48)):  # 64 would save nothing
        model = weighted(text, W=normal(128, 128))
        assert run_pass(LowRank(ratio=ratio, multiple_of=16), model)[0] == 1
        assert weight(model, "W/lr_a").shape == (128, rank)
    _, log = run_pass(LowRank(ratio=0.2, multiple_of=16), weighted(text, W=normal(128, 128)))
    assert "allow rank 12 of 128, the least is 16" in log.skipped[0][1]


def test_rank_follows_the_vectors_of_the_target() -> None:
    text = HEAD + "g (float[N,128] x, float[128,128] W) => (float[N,128] y) { y = MatMul(x, W) }"
    for isa, device, rank in (
        (["avx2", "avx512f"], "cpu", 16),
        (["avx2"], "cpu", 8),
        (["dotprod"], "arm", 8),
    ):
        model = weighted(text, W=low(128, 128, 3))
        target = parse_target({"device": device, "isa": isa})
        LowRank(energy=0.99).run(model, dataclasses.replace(context(), target=target))
        assert weight(model, "W/lr_a").shape == (128, rank)


def test_full_rank_is_declined_with_numbers() -> None:
    text = HEAD + "g (float[N,32] x, float[32,32] W) => (float[N,32] y) { [m] y = MatMul(x, W) }"
    model = weighted(text, W=np.eye(32, dtype=np.float32))
    before = io.to_bytes(model)
    changes, log = run_pass(LowRank(energy=0.9, multiple_of=1), model)
    assert changes == 0
    assert io.to_bytes(model) == before
    reason = "90.0% of the energy needs more; saving 10% of 1,024 MACs allows rank 14 of 32"
    assert log.skipped == [("m", reason)]
    _, log = run_pass(LowRank(ratio=0.01, multiple_of=1), model)
    assert log.skipped == [("m", "1% of 1,024 MACs allow rank 0 of 32, the least is 1")]


def test_candidates_that_are_declined() -> None:
    model = weighted(
        HEAD
        + """g (float[8,8] x, float[1,8,6,6] i, float[8,8] W, float[8,8] S, float[8,1,3,3] D,
               float[2,8,8] B, float[8,8] Q) => (float[8,8] y, float[1,8,4,4] z, float[2,8,8] u) {
          [shared1] a = MatMul(x, S)
          [shared2] b = MatMul(a, S)
          [trans] c = Gemm<transA=1>(b, W)
          [activations] y = MatMul(c, a)
          [depthwise] z = Conv<group=8>(i, D)
          [batched] u = MatMul(x, B)
          [ignored] v = MatMul(x, Q)
        }""",
        W=low(8, 8, 1),
        S=low(8, 8, 1),
        D=normal(8, 1, 3, 3),
        B=normal(2, 8, 8),
        Q=low(8, 8, 1),
    )
    changes, log = run_pass(LowRank(multiple_of=1, measure=False, ignore=("ignored",)), model)
    assert changes == 0
    assert dict(log.skipped) == {
        "shared1": "its weight 'S' has other users",
        "shared2": "its weight 'S' has other users",
        "trans": "its input is transposed (transA)",
        "depthwise": "grouped convolution (8 groups)",
        "batched": "its weight has 3 axes, not 2",
    }


def test_quantized_and_broken_weights_are_left() -> None:
    model = weighted(
        HEAD
        + """g (float[1,8] x, int8[8,8] Q, float s, float[8,8] N) => (float[1,8] y) {
          W = DequantizeLinear(Q, s)
          [fake] a = MatMul(x, W)
          [broken] y = MatMul(a, N)
        }""",
        Q=np.ones((8, 8), np.int8),
        s=np.array(0.5, np.float32),
        N=np.where(np.eye(8), np.inf, 1).astype(np.float32),
    )
    changes, log = run_pass(LowRank(multiple_of=1, measure=False), model)
    assert changes == 0
    assert log.skipped == [
        ("fake", "its weight is quantized"),
        ("broken", "its weight has infinities or NaN"),
    ]


def test_branches_and_functions() -> None:
    ones = ",".join(["1"] * 64)
    model = from_text(
        HEAD.replace('"": 17', '"": 17, "local": 1')
        + f"""g (float[1,8] x, bool c) => (float[1,8] y) <float[8,8] V = {{{ones}}}> {{
          z = local.f(x)
          [if] y = If(c) <
            then_branch = t () => (float[1,8] u) {{ [inside] u = MatMul(z, V) }},
            else_branch = e () => (float[1,8] v) {{ v = Relu(z) }}
          >
        }}
        <domain: "local", opset_import: ["": 17]> f (a) => (b) {{
          W = Constant<value = float[8,8] {{{ones}}}>()
          [inner] b = MatMul(a, W)
        }}"""
    )
    before = model.clone()
    changes, log = run_pass(LowRank(multiple_of=1, measure=False), model)
    assert changes == 1
    assert [name for name, _ in log.touched] == ["inside"]
    assert "inside a function" in dict(log.skipped)["inner"]
    for choice in (True, False):
        feed = {"x": normal(1, 8), "c": np.array(choice)}
        want, got = outputs(before, feed)[0], outputs(model, feed)[0]
        np.testing.assert_allclose(got, want, rtol=1e-4)
    check_again(LowRank(multiple_of=1, measure=False), model)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats(dtype: type) -> None:
    kind = (
        np.dtype(dtype)
        .name.replace("64", "")
        .replace("float", "double" if dtype is np.float64 else "float")
    )
    model = weighted(
        HEAD + f"g ({kind}[3,32] x, {kind}[32,32] W) => ({kind}[3,32] y) {{ y = MatMul(x, W) }}",
        W=low(32, 32, 2).astype(dtype),
    )
    before = model.clone()
    assert run_pass(LowRank(multiple_of=1, measure=False), model)[0] == 1
    assert weight(model, "W/lr_a").dtype == dtype
    feed = feed_for(before)
    assert rel_l2(outputs(before, feed)[0], outputs(model, feed)[0]) < 0.35


@pytest.mark.parametrize("ir_version", [3, 8])
def test_weights_in_constant_nodes_without_names(ir_version: int) -> None:
    ones = ",".join(["1"] * 64)
    model = from_text(
        HEAD.replace("8", str(ir_version))
        + f"""g (float[1,8] x) => (float[1,8] y) {{
          W = Constant<value = float[8,8] {{{ones}}}>()
          a = MatMul(x, W)
          V = Constant<value = float[8,8] {{{ones}}}>()
          y = MatMul(a, V)
        }}"""
    )
    before = model.clone()
    assert run_pass(LowRank(multiple_of=1, measure=False), model)[0] == 2
    names = [n.name for n in model.graph if n.op_type == "MatMul"]
    assert names == ["MatMul/lr_a", "MatMul/lr_b", "MatMul/lr_a_2", "MatMul/lr_b_2"]
    assert_same(before, model)


def test_strip_metadata_leaves_the_marks() -> None:
    model = weighted(
        HEAD + "g (float[1,64] x, float[64,64] W) => (float[1,64] y) { y = MatMul(x, W) }",
        W=normal(64, 64),
    )
    run_pass(LowRank(ratio=0.5, multiple_of=1), model)
    run_pass(StripMetadata(), model)
    assert all(n.metadata_props for n in model.graph)
    assert run_pass(LowRank(ratio=0.5, multiple_of=1), model)[0] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"energy": 0.9, "ratio": 0.5},
        {"energy": 0},
        {"energy": 1.5},
        {"ratio": 1.0},
        {"ratio": 0.95},
        {"min_rank": 0},
        {"multiple_of": 0},
        {"min_saving": 1.0},
        {"rank": 3},
    ],
)
def test_options_that_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LowRank.model_validate(options)
    step = LowRank(ratio=0.6)
    assert LowRank.model_validate(step.model_dump()) == step


@pytest.mark.parametrize("name", ["digits_cnn", "digits_mlp", "digits_transformer"])
@pytest.mark.parametrize("options", [{}, {"ratio": 0.5}])
def test_sample_models(name: str, options: dict[str, object]) -> None:
    model = io.load(SAMPLES / f"{name}.onnx")
    before = model.clone()
    step = LowRank.model_validate(options)
    changes, log = run_pass(step, model)
    assert changes or not options
    assert changes == len(log.touched)
    for want, got in zip(
        outputs(before, feed_for(before)), outputs(model, feed_for(model)), strict=True
    ):
        assert want.shape == got.shape
        assert np.isfinite(got).all()
    check_again(step, model)


@needs_shared
@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "energy"),
    [("cifar_vgg", 0.9), ("squeezenet_fp32_from_fp16", 0.97), ("mnist_selfattn", 0.98)],
)
def test_real_models_fall_in_macs_and_agree(name: str, energy: float) -> None:
    assert SHARED is not None
    model = io.load(SHARED / "models" / f"{name}.onnx")
    for value in [v for v in model.graph.inputs if v.is_initializer()]:
        model.graph.inputs.remove(value)
    before = model.clone()
    model.ir_version = max(model.ir_version, 4)
    step = LowRank(energy=energy, multiple_of=8)
    changes, log = run_pass(step, model)
    assert changes > 0
    assert float(log.notes["macs_saved"]) > 0
    feed = feed_for(before)
    assert rel_l2(outputs(before, feed)[0], outputs(model, feed)[0]) < 0.6
    check_again(step, model)
