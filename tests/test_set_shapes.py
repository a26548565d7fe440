import pytest

from effdl.errors import UsageError
from effdl.graph import io
from effdl.graph.dims import dims_of
from effdl.passes.set_shapes import SetShapes
from tests.support import SAMPLES, assert_same, from_text, run_pass

TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[batch,3,h,w] x, float[batch,?] t) => (float[batch,3,a,b] y, float[batch,c] z)
{ y = Relu(x)  z = Neg(t) }"""


def test_pins_names_everywhere_and_what_follows() -> None:
    model = from_text(TEXT)
    before = model.clone()
    changes, log = run_pass(SetShapes(dims={"batch": 2, "h": 5, "t:1": 7}), model)
    assert changes == 4
    assert len(log.touched) == 4
    assert [dims_of(v.shape) for v in model.graph.inputs] == [(2, 3, 5, "w"), (2, 7)]
    assert [dims_of(v.shape) for v in model.graph.outputs] == [(2, 3, 5, "b"), (2, 7)]
    full = model.clone()
    assert run_pass(SetShapes(dims={"w": 6}), full)[0] == 1
    assert_same(full, before)


def test_a_second_run_changes_nothing_and_another_size_is_refused() -> None:
    model = from_text(TEXT)
    run_pass(SetShapes(dims={"batch": 2, "t:1": 7}), model)
    digest = io.to_bytes(model)
    assert run_pass(SetShapes(dims={"batch": 2, "t:1": 7}), model)[0] == 0
    assert io.to_bytes(model) == digest
    for dims in ({"batch": 3}, {"t:1": 8}, {"bach": 1}, {"x:1": 4}):
        with pytest.raises(UsageError):
            run_pass(SetShapes(dims=dims), model.clone())


def test_the_name_nearest_to_a_wrong_one_is_told() -> None:
    with pytest.raises(UsageError) as e:
        run_pass(SetShapes(dims={"bach": 1}), io.load(SAMPLES / "digits_cnn.onnx"))
    assert "batch" in e.value.hint
