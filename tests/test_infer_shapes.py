from effdl.graph import io
from effdl.graph.dims import dims_of
from effdl.passes.infer_shapes import InferShapes
from tests.support import SAMPLES, assert_same, from_text, run_pass


def test_writes_shapes_and_keeps_the_interface() -> None:
    model = from_text("""<ir_version: 8, opset_import: ["": 17]>
    g (float[n,4] x) => (float[n,2] y) <float[4,2] w = {1,2,3,4,5,6,7,8}>
    { a = MatMul(x, w)  b = Relu(a)  y = Neg(b) }""")
    before = model.clone()
    changes, log = run_pass(InferShapes(), model)
    assert changes == 2
    assert log.notes["values_gained"] == 2
    values = {o.name: dims_of(o.shape) for node in model.graph for o in node.outputs}
    assert values["a"] == ("n", 2)
    assert values["b"] == ("n", 2)
    assert_same(before, model)
    digest = io.to_bytes(model)
    assert run_pass(InferShapes(), model)[0] == 0
    assert io.to_bytes(model) == digest


def test_every_value_of_a_real_network_is_known() -> None:
    model = io.load(SAMPLES / "digits_transformer.onnx")
    run_pass(InferShapes(), model)
    assert all(o.shape is not None for node in model.graph for o in node.outputs)
