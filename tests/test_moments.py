"""Second moments of tensors, against numpy over all rows."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from effdl.data.feeds import Feeds
from effdl.errors import ModelError
from effdl.observe import moments as module
from effdl.observe.moments import moments
from effdl.observe.rows import Rows, Window
from effdl.runtime.session import open_session
from tests.support import from_text


def model() -> ir.Model:
    return from_text(
        """<ir_version: 10, opset_import: ["" : 17]>
        g (float[N,S,6] x) => (float[N,S,6] z) { y = Relu (x) z = Exp (y) }"""
    )


def feeds(count: int = 3, rows: int = 5) -> Feeds:
    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((2, rows, 6)).astype(np.float32)} for _ in range(count)]
    return Feeds(samples, "test", True)


@pytest.mark.parametrize("max_bytes", [1, 1 << 20])
def test_moments_of_inputs_and_inner_values(max_bytes: int) -> None:
    data = feeds()
    layers = {"a": Rows("x", 6), "b": Rows("y", 6)}
    found = dict(moments(model(), layers, data, max_bytes=max_bytes))
    x = np.concatenate([f["x"].reshape(-1, 6) for f in data]).astype(np.float64)
    for name, rows in (("a", x), ("b", np.maximum(x, 0))):
        assert found[name].rows == len(rows)
        np.testing.assert_allclose(found[name].second[0], rows.T @ rows / len(rows), rtol=1e-5)
        np.testing.assert_allclose(found[name].mean[0], rows.mean(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found[name].magnitude[0], np.abs(rows).mean(0), rtol=1e-5)


def test_enough_rows_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAST_ROWS", 64)
    data = feeds(2, 4000)
    found = dict(moments(model(), {"a": Rows("x", 6)}, data))["a"]
    assert 64 <= found.rows <= 200
    np.testing.assert_allclose(found.second[0], np.eye(6), atol=0.6)


def test_what_is_not_finite_is_left_out() -> None:
    data = feeds()
    list(data)[1]["x"][0, 0, 0] = np.inf
    assert set(dict(moments(model(), {"a": Rows("x", 6)}, data))) == set()
    assert dict(moments(model(), {"a": Rows("x", 6)}, data.first(1))).keys() == {"a"}


def test_only_what_is_asked_for_is_computed() -> None:
    broken = from_text(
        """<ir_version: 10, opset_import: ["" : 17]>
        g (float[N,S,6] x) => (float[7] z) <int64[1] seven = {7}>
        { y = Relu (x) z = Reshape (y, seven) }"""
    )
    with pytest.raises(ModelError):
        open_session(broken, None).run(next(iter(feeds())))
    assert dict(moments(broken, {"a": Rows("y", 6)}, feeds()))["a"].rows == 30


def test_weights_that_are_graph_inputs_and_not_needed() -> None:
    """As files of IR version 3 have them."""
    old = from_text(
        """<ir_version: 3, opset_import: ["" : 9]>
        g (float[2,5,6] x, float[6,6] a, float[6,9999] b) => (float[2,5,9999] z)
        { y = MatMul (x, a) z = MatMul (y, b) }"""
    )
    for value in list(old.graph.inputs)[1:]:
        width = 6 if value.name == "a" else 9999
        value.const_value = ir.tensor(np.eye(6, width, dtype=np.float32), name=value.name)
        old.graph.register_initializer(value)
    found = dict(moments(old, {"a": Rows("y", 6)}, feeds()))["a"]
    x = np.concatenate([f["x"].reshape(-1, 6) for f in feeds()])
    np.testing.assert_allclose(found.mean[0], x.mean(0), rtol=1e-4, atol=1e-6)


CASES = [
    (Window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1)), {"pads": [1, 1, 1, 1]}, 1),
    (Window((2, 3), (2, 1), (1, 2), (0, 1, 1, 0)), {}, 2),
    (Window((3, 2), (2, 2), (1, 1), None, "SAME_UPPER"), {"auto_pad": "SAME_UPPER"}, 4),
    (Window((3, 2), (2, 3), (1, 1), None, "SAME_LOWER"), {"auto_pad": "SAME_LOWER"}, 1),
]


@pytest.mark.parametrize(("window", "attributes", "group"), CASES)
def test_rows_times_weights_are_the_convolution(
    window: Window, attributes: dict[str, object], group: int
) -> None:
    """Against ONNX Runtime: every place of the window, in order."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 4, 9, 8)).astype(np.float32)
    w = rng.standard_normal((8, 4 // group, *window.sizes)).astype(np.float32)
    given = {
        "group": group,
        "strides": list(window.strides),
        "dilations": list(window.dilations),
        **({"pads": list(window.pads)} if window.pads else attributes),
    }
    node = helper.make_node("Conv", ["x", "w"], ["y"], **given)
    ports = [
        helper.make_tensor_value_info("x", 1, x.shape),
        helper.make_tensor_value_info("y", 1, None),
    ]
    graph = helper.make_graph([node], "g", ports[:1], ports[1:], [numpy_helper.from_array(w, "w")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    want = ort.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0]
    width = (4 // group) * window.sizes[0] * window.sizes[1]
    rows = Rows("x", width, group, window).take(x, 1 << 20)
    weights = w.reshape(group, 8 // group, width)
    got = np.einsum("gnk,gok->ngo", rows, weights).reshape(2, *want.shape[2:], 8)
    np.testing.assert_allclose(got.transpose(0, 3, 1, 2), want, rtol=1e-4, atol=1e-5)


def test_some_places_of_many() -> None:
    window = Window((3,), (1,), (1,), (1, 1))
    data = np.arange(2 * 1 * 1000, dtype=np.float32).reshape(2, 1, 1000)
    rows = Rows("x", 3, 1, window).take(data, 50)
    assert 30 <= rows.shape[1] <= 60
    middle = rows[0, :, 1]
    inside = (rows[0] != 0).all(1)
    np.testing.assert_array_equal(rows[0, inside, 2], middle[inside] + 1)
