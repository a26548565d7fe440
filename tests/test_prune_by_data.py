"""``prune_weights`` with calibration data, against ONNX Runtime."""

import numpy as np
import onnx_ir as ir
import pytest

from effdl.data.feeds import Feeds
from effdl.graph import io
from effdl.passes.prune import _shares
from effdl.passes.prune.weights import PruneWeights
from tests.support import outputs, run_pass
from tests.weighted import normal, weight, weighted

HEAD = '<ir_version: 8, opset_import: ["": 17]>\n'
CONV = "g (float[N,8,6,6] x, float[{}] W, float[{}] b) => (float[N,{},h,w] y) {{ [c] y = {}(x, W, b) }}"
DENSE = "g (float[N,48] x, float[{}] W, float[20] b) => (float[N,20] y) {{ {} }}"
GROUPED = (12, 4, 3, 3)


def conv(op: str, shape: tuple[int, ...], outs: int) -> ir.Model:
    dims = ",".join(map(str, shape))
    text = CONV.format(dims, outs, outs, op)
    return weighted(HEAD + text, W=normal(*shape), b=normal(outs))


def dense(body: str, *shape: int) -> ir.Model:
    text = DENSE.format(",".join(map(str, shape)), body)
    return weighted(HEAD + text, W=normal(*shape), b=normal(20))


MODELS = {
    "conv": lambda: conv("Conv<pads=[1,1,1,1]>", (12, 8, 3, 3), 12),
    "strided": lambda: conv('Conv<strides=[2,2], auto_pad="SAME_UPPER">', (12, 8, 3, 3), 12),
    "grouped": lambda: conv("Conv<group=2>", GROUPED, 12),
    "depthwise": lambda: conv("Conv<group=8>", (8, 1, 3, 3), 8),
    "transposed": lambda: conv("ConvTranspose<group=2>", (8, 5, 2, 2), 10),
    "gemm": lambda: dense("[c] y = Gemm(x, W, b)", 48, 20),
    "gemm_transposed": lambda: dense("[c] y = Gemm<transB=1>(x, W, b)", 20, 48),
    "matmul": lambda: dense("[c] h = MatMul(x, W)  y = Add(h, b)", 48, 20),
}


def samples(model: ir.Model, count: int = 40, batch: int = 6, seed: int = 0) -> Feeds:
    """Feeds whose channels are correlated, of unequal size and not around zero."""
    rng = np.random.default_rng(7)
    shape = [int(d) for d in list(model.graph.inputs[0].shape)[1:]]
    mix = rng.standard_normal((shape[0], shape[0])) / np.sqrt(np.arange(1, shape[0] + 1))
    shift = rng.standard_normal(shape[0])
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        x = np.moveaxis(rng.standard_normal((batch, *shape)), 1, -1) @ mix.T + shift
        made.append({"x": np.moveaxis(x, -1, 1).astype(np.float32)})
    return Feeds(tuple(made), "made", True)


def loss(before: ir.Model, after: ir.Model, feeds: Feeds) -> tuple[float, float]:
    """Variance of the change of the outputs relative to theirs, and the largest change of their means."""
    both = [
        np.concatenate([outputs(m, f)[0].astype(np.float64) for f in feeds])
        for m in (before, after)
    ]
    axes = tuple(a for a in range(both[0].ndim) if a != 1)
    change = both[1] - both[0]
    relative = change.var(axes).sum() / both[0].var(axes).sum()
    return float(relative), float(np.abs(change.mean(axes)).max())


def zeros(array: np.ndarray) -> int:
    return int(array.size - np.count_nonzero(array))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["auto", "obs", "wanda"])
def test_it_loses_less_than_the_smallest_magnitudes(name: str, method: str) -> None:
    before = MODELS[name]()
    feeds, fresh = samples(before), samples(before, seed=1)
    plain, model = before.clone(), before.clone()
    run_pass(PruneWeights(sparsity=0.6, min_size=1, method="magnitude"), plain, feeds=feeds)
    step = PruneWeights(sparsity=0.6, min_size=1, method=method)
    changes, log = run_pass(step, model, feeds=feeds)
    assert changes == 1
    assert zeros(weight(model, "W")) == round(0.6 * weight(before, "W").size)
    assert log.notes["method"] == ("admm" if method == "auto" else method)
    # Rows of a ConvTranspose are only like those it sums; wanda sees nothing in 9 inputs.
    bound = {"transposed": 1.1, "depthwise": 1.001 if method == "wanda" else 0.9}.get(name, 0.9)
    assert loss(before, model, fresh)[0] < bound * loss(before, plain, fresh)[0]
    bytes_once = io.to_bytes(model)
    assert run_pass(step, model, feeds=feeds)[0] == 0
    assert io.to_bytes(model) == bytes_once


@pytest.mark.parametrize("name", ["conv", "grouped", "depthwise", "gemm", "matmul"])
def test_the_bias_takes_up_what_is_lost_on_average_and_the_error_told_is_true(name: str) -> None:
    before = MODELS[name]()
    feeds, model = samples(before), before.clone()
    _, log = run_pass(PruneWeights(sparsity=0.6, min_size=1), model, feeds=feeds)
    rest, held = feeds.split(5)
    error, _ = loss(before, model, held)
    assert float(log.notes["mean_layer_error"]) == pytest.approx(error, rel=0.15)
    assert loss(before, model, rest)[1] < 0.02  # outputs have a size of several
    assert not np.array_equal(weight(before, "b"), weight(model, "b"))


def test_a_bias_that_others_read_stays_for_them() -> None:
    text = """g (float[N,48] x, float[48,20] W, float[20] b) => (float[N,20] y, float[20] z) {
      [c] y = Gemm(x, W, b)  z = Neg(b) }"""
    before = weighted(HEAD + text, W=normal(48, 20), b=normal(20))
    model, feeds = before.clone(), samples(before)
    run_pass(PruneWeights(sparsity=0.6, min_size=1), model, feeds=feeds)
    feed = next(iter(feeds))
    np.testing.assert_array_equal(outputs(model, feed)[1], outputs(before, feed)[1])
    assert loss(before, model, feeds.split(5)[0])[1] < 0.02


@pytest.mark.parametrize("name", ["conv", "grouped", "transposed", "gemm"])
@pytest.mark.parametrize("method", ["auto", "obs", "wanda"])
@pytest.mark.parametrize("options", [{"pattern": "n:m"}, {"pattern": "block", "block": (2, 2)}])
def test_patterns_are_those_of_magnitude(name: str, method: str, options: dict) -> None:
    before = MODELS[name]()
    feeds, plain, model = samples(before), before.clone(), before.clone()
    step = PruneWeights(min_size=1, method=method, **options)
    run_pass(PruneWeights(min_size=1, method="magnitude", **options), plain, feeds=feeds)
    assert run_pass(step, model, feeds=feeds)[0] == 1
    assert zeros(weight(model, "W")) == zeros(weight(plain, "W"))
    assert loss(before, model, feeds)[0] < 1.001 * loss(before, plain, feeds)[0]
    # The choice by magnitude finds nothing left to do: the zeros lie in its pattern.
    again = PruneWeights(min_size=1, method="magnitude", **options)
    assert run_pass(again, model.clone())[0] == 0
    assert run_pass(step, model, feeds=feeds)[0] == 0


TWO = """g (float[N,48] x, float[48,40] A, float[40] a, float[40,30] B, float[30] b) => (float[N,30] y) {
  [one] h = Gemm(x, A, a)  r = Relu(h)  [two] y = Gemm(r, B, b) }"""


def two() -> ir.Model:
    rng = np.random.default_rng(3)
    few = np.where(rng.random((48, 40)) < 0.1, 1, 0.01).astype(np.float32) * normal(48, 40)
    return weighted(HEAD + TWO, A=few, a=normal(40), B=normal(40, 30), b=normal(30))


@pytest.mark.parametrize("scope", ["global", "erk", "plan"])
@pytest.mark.parametrize("block", [None, (2, 1)])
def test_scopes_reach_the_sparsity_over_all(scope: str, block: tuple[int, int] | None) -> None:
    before, model = two(), two()
    feeds = samples(before)
    options = {"pattern": "block", "block": block} if block else {}
    step = PruneWeights(sparsity=0.7, min_size=1, scope=scope, **options)
    assert run_pass(step, model, feeds=feeds)[0] >= 1
    total = sum(zeros(weight(model, n)) for n in "AB")
    assert total >= round(0.7 * (48 * 40 + 40 * 30)) - 1
    assert total <= 0.75 * (48 * 40 + 40 * 30)
    assert run_pass(step, model, feeds=feeds)[0] == 0


def test_a_plan_takes_from_the_weight_that_has_to_spare() -> None:
    before = two()
    feeds, losses = samples(before), {}
    for scope in ("layer", "plan"):
        model = before.clone()
        run_pass(PruneWeights(sparsity=0.7, min_size=1, scope=scope), model, feeds=feeds)
        losses[scope] = loss(before, model, samples(before, seed=1))[0]
    assert zeros(weight(model, "A")) / 1920 > 0.8 > zeros(weight(model, "B")) / 1200
    assert losses["plan"] < losses["layer"]


@pytest.mark.parametrize("method", ["auto", "wanda", "obs", "admm"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_without_data_it_is_magnitude(method: str, scope: str) -> None:
    plain, model = two(), two()
    run_pass(PruneWeights(min_size=1, method="magnitude", scope=scope), plain)
    _, log = run_pass(PruneWeights(min_size=1, method=method, scope=scope), model)
    assert io.to_bytes(model) == io.to_bytes(plain)
    assert log.notes["method"] == "magnitude"


def test_what_goes_by_magnitude_is_said() -> None:
    text = """g (float[N,48] x, float[48,48] W, float[1,64,48] L, float[1,64,16] R) =>
        (float[N,48] y, float[N,1,1,16] z) {
      [one] h = MatMul(x, W)  [two] y = MatMul(h, W)
      axes = Constant<value = int64[1] {1}>()  u = Unsqueeze(x, axes)
      [rnn] z = LSTM<hidden_size=16>(u, L, R) }"""
    before = weighted(HEAD + text, W=normal(48, 48), L=normal(1, 64, 48), R=normal(1, 64, 16))
    model = before.clone()
    changes, log = run_pass(PruneWeights(min_size=1), model, feeds=samples(before))
    assert changes == 3
    assert log.notes["by_magnitude"] == "1 has several users, 2 is recurrent"
    for name in ("W", "L", "R"):
        old, new = weight(before, name), weight(model, name)
        np.testing.assert_array_equal(new[new != 0], old[new != 0])
    assert "zstd_of_weights" in log.notes


def test_few_samples_do_not_make_it_worse() -> None:
    before = MODELS["gemm"]()
    plain, model = before.clone(), before.clone()
    few, fresh = samples(before, count=12, batch=1), samples(before, seed=1)
    run_pass(PruneWeights(sparsity=0.6, min_size=1), plain)
    run_pass(PruneWeights(sparsity=0.6, min_size=1), model, feeds=few)
    assert loss(before, model, fresh)[0] < 1.1 * loss(before, plain, fresh)[0]


def test_densities_of_erk_reach_the_share() -> None:
    class Fake:
        def __init__(self, *shape: int) -> None:
            self.shape = shape

        def view(self) -> np.ndarray:
            return np.empty(self.shape)

    layers = [Fake(16, 9, 3), Fake(64, 9, 64), Fake(128, 9, 128)]
    sizes = [int(np.prod(f.shape)) for f in layers]
    counts = _shares.erk(layers, sizes, 0.8)
    assert sum(counts) == pytest.approx(0.8 * sum(sizes), abs=2)
    shares = [c / n for c, n in zip(counts, sizes, strict=True)]
    assert shares == sorted(shares)
    assert shares[0] == 0
