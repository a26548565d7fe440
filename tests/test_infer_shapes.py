"""Inferred shapes written into the model."""

from effdl.graph import io
from effdl.graph.walk import interface
from effdl.passes.infer_shapes import InferShapes
from tests.support import SAMPLES, assert_same, from_text, run_pass


def test_values_gain_shapes_and_nothing_else_changes() -> None:
    model = from_text(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[n,3,8,8] x) => (float[a,b] y)
        <float[4,3,3,3] w, int64[2] s = {0,-1}>
        { c = Conv(x, w)  r = Relu(c)  y = Reshape(r, s) }""".replace(
            "float[4,3,3,3] w", "float[4,3,3,3] w = {" + ",".join(["1"] * 108) + "}"
        )
    )
    before = model.clone()
    changes, log = run_pass(InferShapes(), model)
    assert changes == 2 == log.notes["values"]
    assert [str(n.outputs[0].shape) for n in model.graph][:2] == ["[n,4,6,6]"] * 2
    assert interface(model) == interface(before)
    assert_same(before, model)
    data = io.to_bytes(model)
    assert run_pass(InferShapes(), model)[0] == 0
    assert io.to_bytes(model) == data


def test_what_is_declared_is_not_contradicted() -> None:
    model = io.load(SAMPLES / "digits_cnn.onnx")
    declared = {o.name: str(o.shape) for n in model.graph for o in n.outputs if o.shape is not None}
    run_pass(InferShapes(), model)
    after = {o.name: o for n in model.graph for o in n.outputs}
    for name, shape in declared.items():
        if "[" in shape and all(c.isdigit() or c in "[]," for c in shape):
            assert str(after[name].shape) == shape
    assert all(o.shape is not None for o in after.values())
