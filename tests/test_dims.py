from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from effdl.errors import UsageError
from effdl.graph.dims import check_dims, dynamic_dims, guess_dims, known_dims
from tests.support import from_text
from tests.weighted import weighted

TWO = """<ir_version: 8, opset_import: ["": 17]>
g (float[N,3,H,W] x, int64[N] n, float[5,3,3,3] w) => (float[N,5,?,?] y)
{ c = Conv <strides = [2, 2]> (x, w)
  y = Relu(c) }"""


def two() -> ir.Model:
    return weighted(TWO, w=np.ones((5, 3, 3, 3), np.float32))


def test_names_of_dynamic_dimensions() -> None:
    assert dynamic_dims(two()) == {"N": ["x[0]", "n[0]"], "H": ["x[2]"], "W": ["x[3]"]}
    unnamed = from_text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[?,2] x) => (float[?,2] y) { y = Relu(x) }""")
    assert dynamic_dims(unnamed) == {"x:0": ["x[0]"]}
    unnamed.graph.inputs[0].shape = ir.Shape([-1, 2])
    assert dynamic_dims(unnamed) == {"x:0": ["x[0]"]}


@pytest.mark.parametrize(
    ("dims", "text"),
    [
        ({"M": 1}, "no dimension 'M'"),
        ({"N": 0}, "at least 1"),
        ({"N": True}, "at least 1"),
        ({"x:1": 4}, "fixed at 3"),
        ({"N": 1, "x:0": 2}, "two values"),
    ],
)
def test_refuses_dims_that_do_not_fit(dims: dict[str, int], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        check_dims(two(), dims)


def test_nearest_name_and_known_dims() -> None:
    model = from_text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[batch,2] x) => (float[batch,2] y) { y = Relu(x) }""")
    with pytest.raises(UsageError) as e:
        check_dims(model, {"bacth": 2})
    assert "batch" in e.value.hint
    assert known_dims(model, {"gone": 3, "x:0": 4}) == {"batch": 4}
    assert known_dims(model, None) == {}


def test_guesses() -> None:
    def guess(inputs: str, attempt: int = 0, body: str = "y = Identity(a)") -> dict[str, int]:
        text = f"""<ir_version: 8, opset_import: ["": 17]>
            g ({inputs}) => (float[?] y) {{ {body} }}"""
        return guess_dims(from_text(text), None, attempt)

    assert guess("float[N,3,height,width] a") == {"N": 1, "height": 224, "width": 224}
    assert guess("float[?,?,?,3] a") == {"a:0": 1, "a:1": 224, "a:2": 224}
    assert guess("float[?,3,?,?] a", attempt=1)["a:2"] == 256
    assert guess("int64[batch,s7] a") == {"batch": 1, "s7": 64}
    assert guess("float[?,?] a") == {"a:0": 1, "a:1": 576}
    assert guess("float[?,audio_length] a")["audio_length"] == 16000
    assert guess("float[2,?,64] a") == {"a:1": 1}
    assert guess("float[seq_len,batch,8] a") == {"seq_len": 64, "batch": 1}
    assert guess("float[3,?,?] a") == {"a:1": 224, "a:2": 224}
    assert guess("float[?,12,?,64] a") == {"a:0": 1, "a:2": 64}
    decoder = from_text("""<ir_version: 8, opset_import: ["": 17]>
        g (int64[b,total] m, float[b,4,past_seq,8] a, int64[b,seq] i) => (float[?] y)
        { y = Identity(a) }""")
    decoder.graph.inputs[0].shape = ir.Shape(["b", "past_seq + seq"])
    past = guess_dims(decoder)
    assert past == {"b": 1, "past_seq + seq": 80, "past_seq": 16, "seq": 64}


def test_weights_force_dimensions() -> None:
    model = two()
    model.graph.inputs[0].shape = ir.Shape([None, None, None, None])
    assert guess_dims(model)["x:1"] == 3
    linear = weighted(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[?,?] x, float[9,4] w) => (float[?,4] y) { c = Cast <to = 1> (x)
          y = MatMul(c, w) }""",
        w=np.ones((9, 4), np.float32),
    )
    assert guess_dims(linear) == {"x:0": 1, "x:1": 9}
    gemm = weighted(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[?,?] x, float[4,9] w) => (float[?,4] y) { y = Gemm <transB = 1> (x, w) }""",
        w=np.ones((4, 9), np.float32),
    )
    assert guess_dims(gemm) == {"x:0": 1, "x:1": 9}
