"""The pass cluster_weights."""

import numpy as np
import onnx_ir as ir
import pytest

from effdl.data.feeds import Feeds
from effdl.data.npz import load_npz
from effdl.graph import io
from effdl.graph.clean import clean
from effdl.graph.weights import constant
from effdl.passes.cluster.weights import ClusterWeights
from effdl.passes.pack import Pack
from tests.support import SAMPLES, context, outputs, rel_l2, run_pass
from tests.weighted import normal, weight, weighted

HEAD = '<ir_version: 8, opset_import: ["": 17]>\n'
GRAPHS = {
    "conv": (
        "g (float[N,4,9,9] x, float[8,4,3,3] W, float[8] B) => (float[N,8,7,7] y) { y = Conv(x, W, B) }",
        (8, 4, 3, 3),
    ),
    "grouped": (
        "g (float[N,8,9,9] x, float[8,4,3,3] W, float[8] B) => (float[N,8,7,7] y)"
        " { y = Conv<group = 2>(x, W, B) }",
        (8, 4, 3, 3),
    ),
    "depthwise": (
        "g (float[N,8,9,9] x, float[8,1,3,3] W, float[8] B) => (float[N,8,7,7] y)"
        " { y = Conv<group = 8>(x, W, B) }",
        (8, 1, 3, 3),
    ),
    "transposed": (
        "g (float[N,8,9,9] x, float[8,4,3,3] W, float[8] B) => (float[N,8,11,11] y)"
        " { y = ConvTranspose<group = 2>(x, W, B) }",
        (8, 4, 3, 3),
    ),
    "gemm": (
        "g (float[N,24] x, float[24,8] W, float[8] B) => (float[N,8] y)"
        " { y = Gemm<alpha = 0.5, beta = 2.0>(x, W, B) }",
        (24, 8),
    ),
    "gemm_t": (
        "g (float[N,24] x, float[8,24] W, float[8] B) => (float[N,8] y) { y = Gemm<transB = 1>(x, W, B) }",
        (8, 24),
    ),
    "matmul": (
        "g (float[N,5,24] x, float[24,8] W, float[8] B) => (float[N,5,8] y)"
        " { h = MatMul(x, W)  y = Add(B, h) }",
        (24, 8),
    ),
    "stacked": (
        "g (float[N,3,5,24] x, float[3,24,8] W, float[8] B) => (float[N,3,5,8] y)"
        " { h = MatMul(x, W)  y = Add(h, B) }",
        (3, 24, 8),
    ),
}


def model_of(name: str) -> ir.Model:
    graph, shape = GRAPHS[name]
    return weighted(HEAD + graph, W=normal(*shape), B=normal(8, seed=1))


def feeds_of(model: ir.Model, count: int = 40) -> Feeds:
    """Inputs that are correlated and have a mean, as activations do."""
    value = model.graph.inputs[0]
    shape = [4 if not isinstance(d, int) else d for d in value.shape]
    found = []
    for k in range(count):
        x = normal(*shape, seed=10 + k) + normal(*shape[:-1], 1, seed=500 + k) + 1
        found.append({value.name or "": x.astype(np.float32)})
    return Feeds(tuple(found), "test", True)


def error(before: ir.Model, after: ir.Model, feeds: Feeds) -> float:
    want, got = (np.concatenate([outputs(m, f)[0] for f in feeds]) for m in (before, after))
    return rel_l2(want, got)


@pytest.mark.parametrize("name", GRAPHS)
def test_few_values_and_a_small_error(name: str) -> None:
    before = model_of(name)
    feeds = feeds_of(before)
    found = {}
    for data in (None, feeds):
        model = before.clone()
        changes, log = run_pass(
            ClusterWeights(bits=3, min_size=0, targets=("*",)), model, feeds=data
        )
        assert changes == 1, log.skipped
        assert weight(model, "W").shape == GRAPHS[name][1]
        assert len(np.unique(weight(model, "W"))) <= 8
        found[data is None] = error(before, model, feeds)
        again = io.to_bytes(model)
        assert run_pass(ClusterWeights(bits=3, min_size=0), model, feeds=data)[0] == 0
        assert io.to_bytes(model) == again
    if name not in ("stacked", "transposed"):  # whose inputs are not known, or known in part
        assert found[False] < 0.9 * found[True]
    assert found[False] < 0.3


@pytest.mark.parametrize("name", ["conv", "gemm", "matmul"])
def test_the_bias_takes_the_mean_of_the_error(name: str) -> None:
    before = model_of(name)
    feeds, after = feeds_of(before), before.clone()
    run_pass(ClusterWeights(bits=2, min_size=0), after, feeds=feeds)
    want, got = (np.concatenate([outputs(m, f)[0] for f in feeds]) for m in (before, after))
    channels = (0, 2, 3) if name == "conv" else tuple(range(want.ndim - 1))
    assert not np.allclose(want, got, atol=0.05)
    np.testing.assert_allclose(got.mean(channels), want.mean(channels), atol=5e-3)


def test_a_bias_that_others_read_stays() -> None:
    model = weighted(
        HEAD + "g (float[N,24] x, float[8,24] W, float[8] B) => (float[N,8] y, float[8] z)"
        " { y = Gemm<transB = 1>(x, W, B)  z = Relu(B) }",
        W=normal(8, 24),
        B=normal(8),
    )
    run_pass(ClusterWeights(bits=2, min_size=0), model, feeds=feeds_of(model))
    np.testing.assert_array_equal(weight(model, "B"), normal(8))
    assert len(np.unique(weight(model, "W"))) <= 4


@pytest.mark.parametrize("data", [True, False])
def test_zeros_stay_zeros(data: bool) -> None:
    graph, shape = GRAPHS["gemm_t"]
    w = normal(*shape)
    w[np.abs(w) < 0.7] = 0
    model = weighted(HEAD + graph, W=w, B=normal(8))
    run_pass(ClusterWeights(bits=3, min_size=0), model, feeds=feeds_of(model) if data else None)
    assert np.all(weight(model, "W")[w == 0] == 0)
    assert len(np.unique(weight(model, "W"))) <= 8


def test_codebooks_for_runs_of_outputs() -> None:
    model = model_of("gemm_t")
    run_pass(ClusterWeights(bits=1, min_size=0, groups=5), model, feeds=feeds_of(model))
    w = weight(model, "W").reshape(4, -1)  # 5 do not divide 8 outputs
    assert [len(np.unique(part)) for part in w] == [2] * 4
    assert len(np.unique(w)) == 8


def two_layers(rows: int = 64) -> ir.Model:
    return weighted(
        HEAD + f"g (float[N,{rows}] x, float[{rows},64] A, float[64] B, float[64,32] C, float[32] D)"
        " => (float[N,32] y) { a = Gemm(x, A, B)  b = Relu(a)  y = Gemm(b, C, D) }",
        A=normal(rows, 64) / 8, B=normal(64) / 8, C=normal(64, 32, seed=2) / 8, D=normal(32),
    )  # fmt: skip


def test_layers_make_up_for_those_before() -> None:
    before = two_layers()
    feeds, found = feeds_of(before, 100), {}
    for compensate in (True, False):
        after = before.clone()
        run_pass(ClusterWeights(bits=2, compensate=compensate), after, feeds=feeds)
        found[compensate] = error(before, after, feeds)
    assert found[True] < 0.97 * found[False]


def test_an_error_to_keep_buys_entropy() -> None:
    bits, errors = [], []
    for limit in (0.1, 0.2, 0.4):
        model = two_layers()
        _, log = run_pass(
            ClusterWeights(error=limit, compensate=False), model, feeds=feeds_of(model, 100)
        )
        bits.append(float(log.notes["bits_per_weight"]))
        errors.append(float(log.notes["planned_errors"]))
        assert errors[-1] <= limit
    assert bits[0] > bits[1] > bits[2]
    assert errors[0] < errors[1] < errors[2]


def test_an_error_that_cannot_be_kept_is_told() -> None:
    model = two_layers()
    changes, log = run_pass(ClusterWeights(error=1e-6), model, feeds=feeds_of(model))
    assert changes == 2
    assert "more bits" in str(log.notes["error_missed"])


def test_reasons() -> None:
    model = weighted(
        HEAD + "g (float[N,64] x, float[64,64] A, float[64,64] S, float[8,8] T, float[64,64] F)"
        " => (float[N,64] y, float[64,64] s, float[8,8] t)"
        " { a = MatMul(x, A)  b = MatMul(a, S)  y = MatMul(b, F)  s = Relu(S)  t = MatMul(T, T) }",
        A=np.full((64, 64), 0.5, np.float32), S=normal(64, 64), T=normal(8, 8),
        F=np.full((64, 64), np.nan, np.float32),
    )  # fmt: skip
    changes, log = run_pass(ClusterWeights(), model)
    assert changes == 0
    told = " ".join(reason for _, reason in log.skipped)
    for reason in (
        "at most 16 values",
        "something else reads",
        "below min_size",
        "infinities or NaN",
    ):
        assert reason in told


def test_recurrent_weights_and_tables() -> None:
    model = weighted(
        HEAD + "g (int64[6] i, float[60,20] E, float[1,80,20] W, float[1,80,20] R) => (float[6,1,1,20] y)"
        " { e = Gather(E, i)  s = Constant<value_ints = [6,1,20]>()  x = Reshape(e, s)"
        "  y = LSTM<hidden_size = 20>(x, W, R) }",
        E=normal(60, 20), W=normal(1, 80, 20), R=normal(1, 80, 20),
    )  # fmt: skip
    changes, _ = run_pass(ClusterWeights(bits=4), model)
    assert changes == 3
    for name in "EWR":
        values = constant(model.graph.initializers[name])
        assert values is not None
        assert len(np.unique(values)) == 16


def test_a_trained_network_stays_right_and_packs_small() -> None:
    before = io.load(SAMPLES / "digits_mlp.onnx")
    feeds = load_npz(SAMPLES / "digits_mlp.calib.npz", before).first(200)
    model = before.clone()
    run_pass(ClusterWeights(bits=3, error=0.05), model, feeds=feeds)
    with np.load(SAMPLES / "digits_mlp.test.npz") as data:
        x, label = data["image"], data["label"]
    right = [(outputs(m, {"image": x})[0].argmax(1) == label).mean() for m in (before, model)]
    assert right[1] >= right[0] - 0.02
    assert Pack().run(model, context()) >= 1
    clean(model)
    assert len(io.to_bytes(model)) < len(io.to_bytes(before)) / 7
