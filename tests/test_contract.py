"""What every pass is held to, over sample models and small models with awkward structure."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from effdl import passes
from effdl.data.feeds import Feeds
from effdl.data.npz import load_npz
from effdl.graph import io
from effdl.graph.clean import clean
from effdl.graph.walk import interface, opset
from effdl.passes.base import Pass
from tests.support import SAMPLES, context, feed_for, from_text, outputs, rel_l2

OPTIONS = {
    "set_shapes": {"dims": {"batch": 2}},
    "prune_weights": {"sparsity": 0.3, "min_size": 0},
    "low_rank": {"ratio": 0.5},
    "separable": {"energy": 0.9, "measure": False},
    "convert_opset": {"to": 18},
    "prune_channels": {"keep": 0.75},  # no trials, which take long and are tested elsewhere
    "cluster_weights": {"bits": 6, "compensate": False},
}
SAMPLE_NAMES = ("digits_cnn", "digits_mlp", "digits_transformer")

AWKWARD = {
    "shared_weight": """<ir_version: 8, opset_import: ["": 17]>
        g (float[batch,8] x) => (float[batch,8] y)
        <float[8,8] w = {WEIGHTS64}, float[8] b = {1,2,3,4,5,6,7,8}>
        { a = MatMul(x, w)  c = Add(a, b)  d = Relu(c)  e = Gemm(d, w, b)  y = Add(e, d) }""",
    "subgraph": """<ir_version: 8, opset_import: ["": 17]>
        g (float[batch,8] x, bool c) => (float[batch,8] y)
        <float[8,8] w = {WEIGHTS64}>
        { h = MatMul(x, w)
          y = If(c) <then_branch = t () => (float[batch,8] r) { m = MatMul(h, w)  r = Identity(m) },
                     else_branch = e () => (float[batch,8] r) { r = Relu(h) }> }""",
    "loop": """<ir_version: 8, opset_import: ["": 17]>
        g (float[batch,8] x, int64 n, bool c) => (float[batch,8] y)
        <float[8,8] w = {WEIGHTS64}>
        { y = Loop(n, c, x) <body = b (int64 i, bool ci, float[batch,8] v) =>
                (bool co, float[batch,8] vo) { co = Identity(ci)  t = MatMul(v, w)  vo = Tanh(t) }> }""",
    "function": """<ir_version: 8, opset_import: ["": 17, "local": 1]>
        g (float[batch,8] x) => (float[batch,8] y)
        <float[8,8] w = {WEIGHTS64}>
        { a = local.act(x)  b = MatMul(a, w)  y = local.act(b) }
        <domain: "local", opset_import: ["": 17]> act (v) => (r) { s = Sigmoid(v)  r = Mul(v, s) }""",
    "custom_domain": """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        g (float[batch,8] x) => (float[batch,8] y)
        <float[8,8] w = {WEIGHTS64}, float[8] b = {1,2,3,4,5,6,7,8}>
        { a = com.microsoft.FusedGemm <activation: string = "Relu"> (x, w, b)  y = com.microsoft.Gelu(a) }""",
    "passthrough": """<ir_version: 8, opset_import: ["": 17]>
        g (float[batch,8] x) => (float[batch,8] x2, float[batch,8] y, float[batch,8] z)
        { x2 = Identity(x)  y = Relu(x)  z = Identity(y) }""",
    "output_used_inside": """<ir_version: 8, opset_import: ["": 17]>
        g (float[batch,8] x) => (float[batch,8] y, float[batch,8] z)
        <float[8,8] w = {WEIGHTS64}, float[8] s = {1,1,1,1,1,1,1,1}, float[8] m = {0,0,0,0,0,0,0,0}>
        { y = Gemm(x, w, m)  z = BatchNormalization(y, s, m, m, s) }""",
}


def awkward(name: str) -> ir.Model:
    rng = np.random.default_rng(7)
    weights = ",".join(f"{v:.4f}" for v in rng.standard_normal(64))
    return from_text(AWKWARD[name].replace("{WEIGHTS64}", "{" + weights + "}"))


def model_of(name: str) -> ir.Model:
    return io.load(SAMPLES / f"{name}.onnx") if name in SAMPLE_NAMES else awkward(name)


def feeds_of(name: str, model: ir.Model) -> Feeds:
    if name in SAMPLE_NAMES:
        return load_npz(SAMPLES / f"{name}.calib.npz", model).first(16)
    return Feeds(tuple(feed_for(model, seed) for seed in range(4)), "random", False)


def make(name: str) -> Pass:
    return passes.get(name)(**OPTIONS.get(name, {}))


CASES = [(p, m) for p in passes.names() for m in (*SAMPLE_NAMES, *AWKWARD)]


@pytest.mark.parametrize(("pass_name", "model_name"), CASES)
def test_contract(pass_name: str, model_name: str) -> None:
    step = make(pass_name)
    before = model_of(model_name)
    feeds = feeds_of(model_name, before)
    if pass_name == "set_shapes" and "batch" not in io.to_bytes(before).decode("latin1"):
        pytest.skip("no dimension to pin")
    if opset(before) < step.min_opset:
        pytest.skip("the pipeline does not run it below its opset")
    model = before.clone()
    ctx = context(feeds)
    changes = step.run(model, ctx)
    if changes == 0:
        assert io.to_bytes(model) == io.to_bytes(before), "0 changes, but the model was touched"
        return
    clean(model)
    io.check(model)
    if step.keeps_interface:
        assert interface(model) == interface(before)

    feed = feed_for(before, seed=11, batch=2)
    for want, got in zip(outputs(before, feed), outputs(model, feed), strict=True):
        assert want.shape == got.shape
        assert np.isfinite(got).all()
        if not step.lossy:
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    if step.lossy and model_name in SAMPLE_NAMES:  # real samples: noise says little of a loss
        real = {k: np.concatenate([b[k] for b in feeds]) for k in feed}
        want, got = (outputs(m, real)[0] for m in (before, model))
        assert rel_l2(want, got) < 0.7

    again = model.clone()
    assert step.run(again, context(feeds)) == 0, "a second run changes something"
    twin = before.clone()
    step.run(twin, context(feeds))
    clean(twin)
    assert io.to_bytes(twin) == io.to_bytes(model), "two runs give different bytes"


@pytest.mark.parametrize("pass_name", passes.names())
def test_the_input_model_keeps_its_weights(pass_name: str) -> None:
    """A snapshot shares its arrays with the model that is edited: nothing may write into them."""
    before = model_of("digits_cnn")
    if opset(before) < make(pass_name).min_opset:
        pytest.skip("the pipeline does not run it below its opset")
    digest = io.content_digest(before)
    make(pass_name).run(before.clone(), context(feeds_of("digits_cnn", before)))
    assert io.content_digest(before) == digest


@pytest.mark.parametrize("pass_name", passes.names())
def test_external_weights_survive(pass_name: str, tmp_path) -> None:
    io.save(model_of("digits_mlp"), tmp_path / "m.onnx", external=True)
    model = io.load(tmp_path / "m.onnx")
    step = make(pass_name)
    if opset(model) < step.min_opset:
        pytest.skip("the pipeline does not run it below its opset")
    step.run(model, context(feeds_of("digits_mlp", model)))
    clean(model)
    io.save(model, tmp_path / "m.onnx", external=True)
    again = io.load(tmp_path / "m.onnx")
    feed = {"image": np.random.default_rng(0).random((2, 64), np.float32)}
    for want, got in zip(outputs(model, feed), outputs(again, feed), strict=True):
        np.testing.assert_array_equal(want, got)


@pytest.mark.parametrize("pass_name", passes.names())
def test_the_file_is_the_name(pass_name: str) -> None:
    cls = passes.get(pass_name)
    assert passes.name_of(cls) == pass_name
    assert cls.__name__ == passes.class_name(pass_name)
