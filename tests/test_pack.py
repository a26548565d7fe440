"""The pass pack: exact, and nothing is left of it when ONNX Runtime has loaded the model."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from effdl.graph import io
from effdl.graph.clean import clean
from effdl.measure.size import zstd_size
from effdl.passes.pack import MARK, Pack
from effdl.passes.simplify import Simplify
from tests.support import SAMPLES, context, feed_for, outputs, run_pass
from tests.weighted import normal, weighted


def text(opset: int = 17, *shape: int, dtype: str = "float") -> str:
    """A graph that gives the constant W back, and its sum."""
    dims = ",".join(map(str, shape))
    return f"""<ir_version: 8, opset_import: ["": {opset}]>
        g ({dtype}[{dims}] x, {dtype}[{dims}] W) => ({dtype}[{dims}] y) {{ y = Mul(x, W) }}"""


def loaded(model: ir.Model, folder: Path) -> list[str]:
    """The op types that are left when ONNX Runtime has loaded the model."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "loaded.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(io.to_bytes(model), options, providers=["CPUExecutionProvider"])
    return [n.op_type for n in onnx.load(folder / "loaded.onnx").graph.node]


def check(
    array: np.ndarray, form: str, folder: Path, *, opset: int = 17, **options: str
) -> ir.Model:
    """The constant is stored in that form, comes back bit for bit, and costs nothing at run time."""
    dtype = {"float32": "float", "float16": "float16"}[array.dtype.name]
    before = weighted(text(opset, *array.shape, dtype=dtype), W=array)
    model = before.clone()
    changes, log = run_pass(Pack(**options), model)
    clean(model)
    io.check(model)
    assert changes == 1, log.skipped
    assert form in log.touched[0][1]
    assert len(io.to_bytes(model)) < len(io.to_bytes(before)) or not options
    ones = {"x": np.ones(array.shape, array.dtype)}
    for optimize in (True, False):
        (got,) = outputs(model, ones, optimize=optimize)
        assert got.tobytes() == array.tobytes()
    assert loaded(model, folder) == loaded(before, folder)
    again = model.clone()
    assert Pack(**options).run(again, context()) == 0
    assert io.to_bytes(again) == io.to_bytes(model)
    return model


def pick(k: int, *shape: int, seed: int = 0, zeros: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    array = rng.choice(normal(k, seed=seed), shape)
    array[rng.random(shape) < zeros] = 0
    return array


@pytest.mark.parametrize("k", [2, 3, 6, 16, 200])
@pytest.mark.parametrize("opset", [7, 10, 17, 21])
def test_few_values(k: int, opset: int, tmp_path: Path) -> None:
    check(pick(k, 61, 83), f"{k} values", tmp_path, opset=opset)


def test_half_precision_weights_with_few_values(tmp_path: Path) -> None:
    check(pick(16, 161, 183).astype(np.float16), "16 values", tmp_path, smallest="raw")


def test_infinities_and_signs_of_zeros(tmp_path: Path) -> None:
    array = np.random.default_rng(0).choice(
        np.array([0.0, -0.0, 3, np.inf, -np.inf], np.float32), (64, 64)
    )
    check(array, "5 values", tmp_path)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_codebook_for_a_run_of_outputs(axis: int, tmp_path: Path) -> None:
    parts = [pick(16, 16, 700, seed=s) for s in range(4)]
    check(
        np.concatenate(parts).swapaxes(0, 1 - axis).copy() if axis else np.concatenate(parts),
        "4 x 16 values",
        tmp_path,
    )


def test_zeros_in_a_bitmap(tmp_path: Path) -> None:
    model = check(pick(15, 300, 301, zeros=0.9), "bitmap and", tmp_path, smallest="raw")
    assert len(io.to_bytes(model)) < 300 * 301 * 4 / 17  # 1 bit, and 4 for every tenth


def test_zeros_in_a_bitmap_before_numbers(tmp_path: Path) -> None:
    array = normal(300, 301)
    array[np.abs(array) < 1.5] = 0
    check(array, "bitmap and numbers", tmp_path)
    check(array, "bitmap and numbers", tmp_path, smallest="raw")
    check(array.astype(np.float16), "bitmap and numbers", tmp_path, smallest="raw")


def test_zeros_in_a_bitmap_before_groups_of_values(tmp_path: Path) -> None:
    parts = [pick(15, 16, 2000, seed=s, zeros=0.9) for s in range(4)]
    check(np.concatenate(parts), "bitmap and 4 x", tmp_path, smallest="raw")


@pytest.mark.parametrize("axis", [0, 1])
def test_integers_with_scales(axis: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    q = rng.integers(-127, 128, (70, 71)).astype(np.float32)
    scale = rng.random((70, 1) if axis == 0 else (1, 71)).astype(np.float32)
    check(q * scale, "int8 with scales", tmp_path, smallest="raw")


def test_float16_is_enough(tmp_path: Path) -> None:
    check(normal(70, 71).astype(np.float16).astype(np.float32), "float16", tmp_path)


def test_trained_weights_are_taken_apart_where_that_compresses(tmp_path: Path) -> None:
    before = weighted(text(17, 300, 301), W=normal(300, 301) * np.float32(0.05))
    model = check(normal(300, 301) * np.float32(0.05), "parts of floats", tmp_path)
    sizes = []
    for k, m in enumerate((before, model)):
        io.save(m, tmp_path / f"{k}.onnx")
        sizes.append(zstd_size(tmp_path / f"{k}.onnx"))
    assert sizes[1] < 0.95 * sizes[0]
    assert run_pass(Pack(smallest="raw"), before)[0] == 0


def test_what_is_fed_or_leaves_the_graph_stays() -> None:
    model = weighted(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[64,64] x, float[64,64] W) => (float[64,64] y, float[64,64] W) { y = Mul(x, W) }""",
        W=pick(4, 64, 64),
    )
    changes, log = run_pass(Pack(), model)
    assert changes == 0
    assert "output of the graph" in log.skipped[0][1]


def test_constants_in_nodes_and_in_branches(tmp_path: Path) -> None:
    values = ",".join(str(v) for v in pick(4, 1200))
    model = io.from_proto(
        onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[1200] x, bool c) => (float[1200] y)
        {{ y = If(c) <then_branch = t () => (float[1200] r)
                {{ w = Constant<value = float[1200] {{{values}}}>()  r = Mul(x, w) }},
             else_branch = e () => (float[1200] q) {{ q = Relu(x) }}> }}"""),
        "text",
        None,
    )
    before = model.clone()
    assert run_pass(Pack(smallest="raw"), model)[0] == 1
    clean(model)
    io.check(model)
    for truth in (True, False):
        feed = {"x": normal(1200), "c": np.array(truth)}
        np.testing.assert_array_equal(outputs(model, feed)[0], outputs(before, feed)[0])
    assert not any(n.op_type == "Constant" for n in model.graph.all_nodes())


def test_packed_weights_survive_simplify(tmp_path: Path) -> None:
    model = check(pick(16, 61, 83), "16 values", tmp_path)
    size = len(io.to_bytes(model))
    Simplify().run(model, context())
    clean(model)
    assert len(io.to_bytes(model)) <= size + 100
    assert any(MARK in n.metadata_props for n in model.graph)


def test_a_real_model_of_few_values(tmp_path: Path) -> None:
    model = io.load(SAMPLES / "digits_cnn.onnx")
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        if tensor.size >= 1024 and tensor.dtype == ir.DataType.FLOAT:
            value.const_value = ir.tensor(np.round(tensor.numpy(), 1), name=value.name)
    before = model.clone()
    assert run_pass(Pack(), model)[0] > 0
    clean(model)
    feed = feed_for(before)
    for want, got in zip(outputs(before, feed), outputs(model, feed), strict=True):
        np.testing.assert_array_equal(want, got)
    assert loaded(model, tmp_path) == loaded(before, tmp_path)
    assert len(io.to_bytes(model)) < len(io.to_bytes(before)) / 2
