import numpy as np
import onnx_ir as ir
import pytest
from pydantic import ValidationError

from effdl.errors import EffdlError
from effdl.graph import io
from effdl.passes.prune._layout import layout_of
from effdl.passes.prune.weights import PruneWeights
from effdl.solve import sparsity
from tests.support import SAMPLES, SHARED, feed_for, from_text, needs_shared, outputs, run_pass
from tests.weighted import normal, weight, weighted

MLP = """<ir_version: 8, opset_import: ["": 17]>
g (float[N,32] x, float[32,64] A, float[64] a, float[16,64] B, float[16] b) => (float[N,16] y) {
  [one] h = Gemm(x, A, a)
  r = Relu(h)
  [two] y = Gemm<transB=1>(r, B, b)
}"""


def mlp(dtype: type = np.float32) -> ir.Model:
    text = MLP.replace("float[", "float16[") if dtype is np.float16 else MLP
    return weighted(
        text,
        A=normal(32, 64, dtype=dtype),
        a=normal(64, dtype=dtype),
        B=normal(16, 64, seed=1, dtype=dtype) / dtype(10),
        b=normal(16, dtype=dtype),
    )


def zeros(array: np.ndarray) -> int:
    return int(array.size - np.count_nonzero(array))


def check_again(step: PruneWeights, model: ir.Model) -> None:
    """A second run returns 0 and leaves the bytes as they are."""
    before = io.to_bytes(model)
    changes, log = run_pass(step, model)
    assert changes == 0
    assert not log.touched
    assert io.to_bytes(model) == before


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_layer_scope_reaches_the_share_in_every_weight(dtype: type) -> None:
    model, before = mlp(dtype), mlp(dtype)
    step = PruneWeights(sparsity=0.6)
    changes, log = run_pass(step, model)
    assert changes == 2
    for name in "AB":
        old, new = weight(before, name), weight(model, name)
        assert new.dtype == old.dtype
        assert zeros(new) == round(0.6 * old.size)
        assert np.abs(old[new == 0]).max() <= np.abs(new[new != 0]).min()
        np.testing.assert_array_equal(new[new != 0], old[new != 0])
    np.testing.assert_array_equal(weight(model, "a"), weight(before, "a"))
    assert log.notes["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert log.notes["weights_zeroed"] == round(0.6 * 2048) + round(0.6 * 1024)
    assert "dense speed" in str(log.notes["speed"])
    assert [name for name, _ in log.touched] == ["one", "two"]
    assert np.isfinite(outputs(model, feed_for(model))[0]).all()
    check_again(step, model)


def test_global_scope_has_one_threshold() -> None:
    model, before = mlp(), mlp()
    step = PruneWeights(sparsity=0.5, scope="global")
    assert run_pass(step, model)[0] == 2
    every = np.concatenate([weight(before, n).ravel() for n in "AB"])
    kept = np.concatenate([weight(model, n).ravel() for n in "AB"])
    assert zeros(kept) == 1536
    assert np.abs(every[kept == 0]).max() <= np.abs(kept[kept != 0]).min()
    assert zeros(weight(model, "B")) > 0.9 * 1024  # its weights are ten times smaller
    check_again(step, model)


def test_the_snapshot_keeps_its_weights() -> None:
    model = mlp()
    snapshot = model.clone()
    want = outputs(snapshot, feed_for(model))[0]
    run_pass(PruneWeights(), model)
    assert zeros(weight(snapshot, "A")) == 0
    np.testing.assert_array_equal(outputs(snapshot, feed_for(model))[0], want)


def test_n_m_groups_run_along_the_inputs() -> None:
    model, before = mlp(), mlp()
    step = PruneWeights(pattern="n:m", n_m="1:4")
    assert run_pass(step, model)[0] == 2
    for name, axis in (("A", 0), ("B", 1)):  # [inputs, outputs] and, with transB, [outputs, inputs]
        rows = np.moveaxis(weight(model, name), axis, -1)
        old = np.moveaxis(weight(before, name), axis, -1)
        np.testing.assert_array_equal(rows != 0, sparsity.n_m_mask(old, 1, 4))
        assert (np.count_nonzero(rows.reshape(-1, 4), axis=1) == 1).all()
    check_again(step, model)


def test_n_m_of_a_convolution_groups_the_channels_of_one_kernel_position() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[1,8,5,5] x, float[6,8,3,3] W) => (float[1,6,3,3] y) { [c] y = Conv(x, W) }"""
    model = weighted(text, W=normal(6, 8, 3, 3))
    step = PruneWeights(pattern="n:m", min_size=1)
    assert run_pass(step, model)[0] == 1
    groups = weight(model, "W").reshape(6, 2, 4, 9)
    assert (np.count_nonzero(groups, axis=2) == 2).all()
    check_again(step, model)


def test_blocks_are_outputs_by_inputs() -> None:
    model = mlp()
    step = PruneWeights(pattern="block", block=(8, 2), sparsity=0.75)
    assert run_pass(step, model)[0] == 2
    for matrix in (weight(model, "A").T, weight(model, "B")):
        rows, columns = matrix.shape
        counts = np.count_nonzero(matrix.reshape(rows // 8, 8, columns // 2, 2), axis=(1, 3))
        assert set(np.unique(counts)) == {0, 16}
        assert (counts == 0).mean() == pytest.approx(0.75)
    check_again(step, model)


def test_global_blocks() -> None:
    model = mlp()
    step = PruneWeights(pattern="block", scope="global", sparsity=0.5, norm="l2")
    assert run_pass(step, model)[0] == 2
    assert zeros(weight(model, "A")) + zeros(weight(model, "B")) == 1536
    check_again(step, model)


def dot_rows(op: str, index: int, shape: tuple[int, ...], **attributes: int) -> list[np.ndarray]:
    """Flat indices of the weights that each scalar of a one-element output sums over."""
    node = ir.node(op, [None, None], attributes)
    layout = layout_of(node, index, shape)
    assert layout is not None
    numbers = np.arange(np.prod(shape)).reshape(shape)
    view = layout.view(numbers)
    np.testing.assert_array_equal(layout.restore(view).reshape(shape), numbers)
    return [np.sort(row.ravel()) for row in view]


def test_layouts_against_the_definition_of_the_operators() -> None:
    w = np.arange(24)
    for row, n in zip(dot_rows("MatMul", 1, (2, 3, 4)), range(8), strict=True):
        np.testing.assert_array_equal(row, w.reshape(2, 3, 4)[n // 4, :, n % 4])
    for row, n in zip(dot_rows("MatMul", 0, (6, 4)), range(6), strict=True):
        np.testing.assert_array_equal(row, w.reshape(6, 4)[n])
    for row, n in zip(dot_rows("Gemm", 1, (6, 4)), range(4), strict=True):
        np.testing.assert_array_equal(row, w.reshape(6, 4)[:, n])
    for row, n in zip(dot_rows("LSTM", 1, (2, 4, 3)), range(8), strict=True):
        np.testing.assert_array_equal(row, w.reshape(8, 3)[n])
    # ConvTranspose, 2 groups: output n of group g sums the inputs of that group.
    rows = dot_rows("ConvTranspose", 1, (4, 3, 2), group=2)
    for row, n in zip(rows, range(6), strict=True):
        g = n // 3
        np.testing.assert_array_equal(
            row, np.sort(w.reshape(4, 3, 2)[2 * g : 2 * g + 2, n % 3].ravel())
        )
    assert layout_of(ir.node("Conv", [None, None]), 1, (4, 4)) is None


def test_recurrent_weights_but_not_biases() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[3,1,8] x, float[1,64,8] W, float[1,64,16] R, float[1,128] B) => (float[3,1,1,16] y) {
      [rnn] y = LSTM<hidden_size=16>(x, W, R, B)
    }"""
    model = weighted(text, W=normal(1, 64, 8), R=normal(1, 64, 16), B=normal(1, 128))
    step = PruneWeights(min_size=1)
    assert run_pass(step, model)[0] == 2
    assert zeros(weight(model, "W")) == 256
    assert zeros(weight(model, "R")) == 512
    assert zeros(weight(model, "B")) == 0
    assert len(outputs(model, feed_for(model))) == 1
    check_again(step, model)


SHARED_TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[4,16] x, float[16,16] W) => (float[4,16] y) {
  [first] a = MatMul(x, W)
  [second] y = Gemm<transB=%d>(a, W)
}"""


def test_a_shared_weight_is_pruned_once_for_all() -> None:
    model = weighted(SHARED_TEXT % 0, W=normal(16, 16))
    step = PruneWeights(min_size=1, pattern="n:m")
    changes, log = run_pass(step, model)
    assert changes == 1
    assert [name for name, _ in log.touched] == ["first", "second"]
    assert list(model.graph.initializers) == ["W"]
    check_again(step, model)


def test_a_shared_weight_read_along_two_axes() -> None:
    model = weighted(SHARED_TEXT % 1, W=normal(16, 16))
    changes, log = run_pass(PruneWeights(min_size=1, pattern="n:m"), model)
    assert changes == 0
    assert log.skipped == [("second", "reads the shared weight 'W' along another axis")]
    assert run_pass(PruneWeights(min_size=1), model)[0] == 1  # single weights have no axis


def test_a_shared_weight_with_another_user_stays() -> None:
    model = weighted(SHARED_TEXT % 0, W=normal(16, 16))
    before = io.to_bytes(model)
    changes, log = run_pass(PruneWeights(min_size=1, ignore=("second",)), model)
    assert changes == 0
    assert io.to_bytes(model) == before
    assert log.skipped == [("first", "its weight 'W' is also used by 'second', not pruned here")]


def test_embeddings_only_when_named() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (int64[3] i, float[40,32] E) => (float[3,32] y) { [embed] y = Gather(E, i) }"""
    model = weighted(text, E=normal(40, 32))
    assert run_pass(PruneWeights(), model)[0] == 0
    assert run_pass(PruneWeights(targets=("Gather",)), model)[0] == 1
    assert zeros(weight(model, "E")) == 640


def test_weights_in_constant_nodes_and_branches() -> None:
    model = from_text(
        """<ir_version: 8, opset_import: ["": 17]>
    g (float[1,2] x, bool c) => (float[1,4] y)
      <float[2,4] V = {1,2,3,4,5,6,7,8}> {
      [if] y = If(c) <
        then_branch = t () => (float[1,4] u) {
          W = Constant<value = float[2,4] {8,7,6,5,4,3,2,1}>()
          [mt] u = MatMul(x, W)
        },
        else_branch = e () => (float[1,4] v) { [me] v = MatMul(x, V) }
      >
    }"""
    )
    step = PruneWeights(min_size=1)
    changes, log = run_pass(step, model)
    assert changes == 2
    assert {name for name, _ in log.touched} == {"mt", "me"}
    x = np.array([[1, 1]], np.float32)
    for choice, want in ((True, [8, 7, 6, 5]), (False, [5, 6, 7, 8])):
        got = outputs(model, {"x": x, "c": np.array(choice)})[0]
        np.testing.assert_array_equal(got, [want])
    changes, _ = run_pass(step, model)
    assert changes == 0


def test_a_constant_becomes_an_initializer_in_old_formats() -> None:
    model = from_text("""<ir_version: 3, opset_import: ["": 7]>
    g (float[1,2] x) => (float[1,4] y) {
      W = Constant<value = float[2,4] {8,7,6,5,4,3,2,1}>()
      y = MatMul(x, W)
    }""")
    assert run_pass(PruneWeights(min_size=1), model)[0] == 1
    got = outputs(model, {"x": np.array([[1, 1]], np.float32)})[0]
    np.testing.assert_array_equal(got, [[8, 7, 6, 5]])


def test_weights_inside_a_function_are_left() -> None:
    model = from_text("""<ir_version: 8, opset_import: ["": 17, "local": 1]>
    g (float[1,2] x) => (float[1,4] y) { y = local.f(x) }
    <domain: "local", opset_import: ["": 17]> f (a) => (b) {
      W = Constant<value = float[2,4] {8,7,6,5,4,3,2,1}>()
      [inner] b = MatMul(a, W)
    }""")
    before = io.to_bytes(model)
    changes, log = run_pass(PruneWeights(min_size=1), model)
    assert changes == 0
    assert io.to_bytes(model) == before
    assert "inside a function" in dict(log.skipped)["inner"]


def test_quantized_weights_are_left() -> None:
    model = from_text("""<ir_version: 8, opset_import: ["": 17]>
    g (float[1,2] x) => (float[1,4] y)
      <int8[2,4] Q = {1,2,3,4,5,6,7,8}, float s = {0.5}, float xs = {0.1}, uint8 z = {0}> {
      xq = QuantizeLinear(x, xs, z)
      xd = DequantizeLinear(xq, xs, z)
      W = DequantizeLinear(Q, s)
      [fake] a = MatMul(xd, W)
      [real] i = MatMulInteger(xq, Q)
      f = Cast<to=1>(i)
      y = Add(a, f)
    }""")
    changes, log = run_pass(PruneWeights(min_size=1), model)
    assert changes == 0
    assert log.skipped == [
        ("fake", "its weight 'W' is quantized"),
        ("real", "its weight 'Q' is quantized"),
    ]


def test_what_is_too_small_is_said() -> None:
    changes, log = run_pass(PruneWeights(min_size=5000), mlp())
    assert changes == 0
    assert ("one", "2048 weights, below min_size 5000") in log.skipped
    assert run_pass(PruneWeights(sparsity=0), mlp())[0] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"pattern": "n:m", "n_m": "4:4"},
        {"pattern": "n:m", "n_m": "0:4"},
        {"pattern": "n:m", "n_m": "two:four"},
        {"pattern": "n:m", "sparsity": 0.7},
        {"pattern": "n:m", "scope": "global"},
        {"pattern": "block", "block": (0, 4)},
        {"pattern": "block", "block": (1, 1)},
        {"n_m": "1:4"},
        {"block": (2, 2)},
        {"scope": "model"},
        {"typo": 1},
    ],
)
def test_options_that_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PruneWeights.model_validate(options)


def test_options_survive_a_round_trip_and_yaml() -> None:
    step = PruneWeights.model_validate({"pattern": "n:m", "n_m": 124})  # YAML's reading of 2:4
    assert step.n_m == "2:4"
    assert PruneWeights.model_validate(step.model_dump()) == step
    plain = PruneWeights(sparsity=0.7)
    assert PruneWeights.model_validate(plain.model_dump()) == plain


@pytest.mark.parametrize("name", ["digits_cnn", "digits_mlp", "digits_transformer"])
@pytest.mark.parametrize(
    "options", [{}, {"scope": "global"}, {"pattern": "n:m"}, {"pattern": "block"}]
)
def test_sample_models(name: str, options: dict[str, object]) -> None:
    model = io.load(SAMPLES / f"{name}.onnx")
    step = PruneWeights.model_validate(options)
    changes, log = run_pass(step, model)
    assert changes > 0
    assert 0.4 < float(log.notes["sparsity"]) < 0.6
    assert np.isfinite(outputs(model, feed_for(model))[0]).all()
    check_again(step, model)


@needs_shared
@pytest.mark.shared
def test_real_models() -> None:
    assert SHARED is not None
    for file in sorted((SHARED / "models").glob("*.onnx")):
        try:
            model = io.load(file)
        except EffdlError:
            continue
        step = PruneWeights()
        run_pass(step, model)
        check_again(step, model)
