"""What an inference has to compute and to move: MACs, bytes, number formats, samples."""

from typing import Any

import numpy as np
import pytest

from effdl.measure.work import batch_of, feed_dims, model_work
from tests.support import from_text
from tests.weighted import weighted

TEXT = '<ir_version: 8, opset_import: ["": 17]> g '

QUANT = {"s": np.array(0.1, np.float32), "z": np.array(0, np.uint8), "zw": np.array(0, np.int8)}
"""Scale and zero points."""


def test_macs_and_bytes_of_one_product() -> None:
    text = "(float[B,8] x, float[8,4] w) => (float[B,4] y) { y = MatMul(x, w) }"
    found = model_work(weighted(TEXT + text, w=_zeros(8, 4)), [{"x": _zeros(3, 8)}])
    assert found.macs == 3 * 8 * 4
    assert found.params == 32
    assert found.formats == {"fp32": 1.0}
    data = 4 * (3 * 8 + 3 * 4)
    assert found.moved == 4 * 32 + data + data  # weights, graph inputs and outputs, the node's
    assert found.resident == 4 * 32 + data
    assert found.batch == 3


def test_elementwise_nodes_move_nothing_of_their_own() -> None:
    text = "(float[2,8] x, float[8,8] w) => (float[2,8] y) "
    moved = {
        model_work(weighted(TEXT + text + body, w=_zeros(8, 8)), [{"x": _zeros(2, 8)}]).moved
        for body in ("{ y = MatMul(x, w) }", "{ a = MatMul(x, w) b = Relu(a) y = Sigmoid(b) }")
    }
    assert len(moved) == 1


def test_a_qdq_model_counts_in_bytes() -> None:
    text = (
        "(float[2,8] x, int8[8,4] w, float s, uint8 z, int8 zw) => (float[2,4] y) {"
        " q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) dw = DequantizeLinear(w, s, zw)"
        " m = MatMul(d, dw) r = Relu(m) e = QuantizeLinear(r, s, z) y = DequantizeLinear(e, s, z) }"
    )
    model = weighted(TEXT + text, w=np.zeros((8, 4), np.int8), **QUANT)
    found = model_work(model, [{"x": _zeros(2, 8)}])
    assert found.formats == {"int8": 1.0}
    weights = 32 + 4 + 1 + 1
    assert found.moved == weights + 4 * (16 + 8) + (16 + 8)


def test_number_formats_by_share_of_macs() -> None:
    text = (
        "(uint8[4,8] a, float16[4,8] h, float[4,8] x, int8[8,8] b, float16[8,8] c, float[8,24] d)"
        " => (int32[4,8] y, float16[4,8] z, float[4,24] u)"
        " { y = MatMulInteger(a, b) z = MatMul(h, c) u = MatMul(x, d) }"
    )
    model = weighted(
        TEXT + text, b=np.zeros((8, 8), np.int8), c=np.zeros((8, 8), np.float16), d=_zeros(8, 24)
    )
    feed = {"a": np.zeros((4, 8), np.uint8), "h": np.zeros((4, 8), np.float16), "x": _zeros(4, 8)}
    want = {"int8": 0.2, "fp16": 0.2, "fp32": 0.6}
    assert model_work(model, [feed]).formats == pytest.approx(want)


def test_weights_alone_in_8_bits_are_multiplied_in_float() -> None:
    text = (
        "(float[2,8] x, int8[8,4] w, float s, int8 zw) => (float[2,4] y)"
        " { dw = DequantizeLinear(w, s, zw) y = MatMul(x, dw) }"
    )
    weights = {"w": np.zeros((8, 4), np.int8), "s": QUANT["s"], "zw": QUANT["zw"]}
    found = model_work(weighted(TEXT + text, **weights), [{"x": _zeros(2, 8)}])
    assert found.formats == {"fp32": 1.0}


def test_feeds_of_several_shapes_count_on_average() -> None:
    model = from_text(
        TEXT + "(float[1,N] x) => (float[N,N] y) { t = Transpose(x)\n y = MatMul(t, x) }"
    )
    feeds = [{"x": _zeros(1, n)} for n in (4, 4, 10)]
    assert model_work(model, feeds).macs == round((16 + 16 + 100) / 3)
    assert feed_dims(model, feeds[0]) == {"N": 4}


@pytest.mark.parametrize(
    ("inputs", "feed", "batch"),
    [
        ("float[batch,3] x, float[2,batch,8] h", {"x": (5, 3), "h": (2, 5, 8)}, 5),
        ("float[N,3] x, float[N] m", {"x": (7, 3), "m": (7,)}, 7),
        ("float[1,3,8,8] x", {"x": (1, 3, 8, 8)}, 1),
        ("float[4,3,8,8] x", {"x": (4, 3, 8, 8)}, 4),
        ("float[1,576] x, float[2,1,128] h", {"x": (1, 576), "h": (2, 1, 128)}, None),
        ("float[128,3] x", {"x": (128, 3)}, None),
        ("float x", {"x": ()}, None),
    ],
)
def test_samples_in_a_run(inputs: str, feed: dict[str, tuple[int, ...]], batch: int | None) -> None:
    model = from_text(TEXT + f"({inputs}) => (float y) {{ y = ReduceSum <keepdims = 0> (x) }}")
    assert batch_of(model, {k: _zeros(*v) for k, v in feed.items()}) == batch


def _zeros(*shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape, np.float32)
