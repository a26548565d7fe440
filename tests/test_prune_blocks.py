"""prune_blocks on small graphs with residual blocks of every form, and on a transformer."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

from effdl.data.feeds import Feeds
from effdl.data.npz import load_npz
from effdl.graph import io
from effdl.graph.clean import clean
from effdl.graph.cost import model_cost
from effdl.graph.weights import constant
from effdl.passes.base import Context, PassLog
from effdl.passes.prune import _block_cost
from effdl.passes.prune._block_find import blocks, layers
from effdl.passes.prune.blocks import PruneBlocks
from tests.support import SAMPLES, context, feed_for, from_text, op_counts, outputs, rel_l2

CNN = """<ir_version: 8, opset_import: ["": 17]>
    g (float[batch,4,6,6] x) => (float[batch,3] y)
    <R[4,4,3,3] w0, R[4,4,3,3] w1, R[4] b1, R[4,4,3,3] w2, R[4] b2, R[8,4,3,3] w3, R[8,4,1,1] w4,
     R[8,8,3,3] w5, R[8] b5, R[8,3] head>
    { s = Conv<pads = [1,1,1,1]>(x, w0)  r0 = Relu(s)
      c1 = Conv<pads = [1,1,1,1]>(r0, w1, b1)  a1 = Add(c1, r0)  r1 = Relu(a1)
      c2 = Conv<pads = [1,1,1,1]>(r1, w2, b2)  a2 = Add(r1, c2)  r2 = Relu(a2)
      c3 = Conv<pads = [1,1,1,1]>(r2, w3)  c4 = Conv(r2, w4)  a3 = Add(c3, c4)  r3 = Relu(a3)
      c5 = Conv<pads = [1,1,1,1]>(r3, w5, b5)  a4 = Add(c5, r3)
      p = ReduceMean<axes = [2,3], keepdims = 0>(a4)  y = MatMul(p, head) }"""

PRE_NORM = """<ir_version: 8, opset_import: ["": 17]>
    g (float[batch,5,4] x) => (float[batch,5,4] y)
    <R[4] g1, R[4] g2, R[4,4] q, R[4,4] k, R[4,4] v, R[4,4] o, R[4,8] up, R[8,4] down, R[4] bias,
     R[4,4] first>
    { h = MatMul(x, first)
      n1 = LayerNormalization(h, g1)  mq = MatMul(n1, q)  mk = MatMul(n1, k)  mv = MatMul(n1, v)
      kt = Transpose<perm = [0,2,1]>(mk)  score = MatMul(mq, kt)  p = Softmax(score)
      ctx = MatMul(p, mv)  att = MatMul(ctx, o)  a = Add(h, att)
      n2 = LayerNormalization(a, g2)  u = MatMul(n2, up)  t = Tanh(u)  d = MatMul(t, down)
      db = Add(d, bias)  b = Add(db, a)  y = MatMul(b, first) }"""

POST_NORM = """<ir_version: 8, opset_import: ["": 17]>
    g (float[batch,5,4] x) => (float[batch,5,4] y)
    <R[4] g1, R[4] g2, R[4,4] q, R[4,4] o, R[4,8] up, R[8,4] down>
    { mq = MatMul(x, q)  xt = Transpose<perm = [0,2,1]>(x)  score = MatMul(mq, xt)  p = Softmax(score)
      ctx = MatMul(p, x)  att = MatMul(ctx, o)  a = Add(att, x)  n1 = LayerNormalization(a, g1)
      u = MatMul(n1, up)  t = Relu(u)  d = MatMul(t, down)  b = Add(d, n1)
      y = LayerNormalization(b, g2) }"""

SKIP_NORM = """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
    g (float[batch,5,4] x) => (float[batch,5,4] y)
    <R[4] g1, R[4] g2, R[4] beta, R[4] extra, R[4,4] w1, R[4,8] up, R[8,4] down>
    { m = MatMul(x, w1)
      n1, e1, e2, s1 = com.microsoft.SkipLayerNormalization<epsilon = 0.001>(m, x, g1, beta)
      u = MatMul(n1, up)  t = Relu(u)  d = MatMul(t, down)
      n2, f1, f2, s2 = com.microsoft.SkipLayerNormalization<epsilon = 0.001>(s1, d, g2, beta, extra)
      y = Add(n2, s2) }"""


def built(text: str, seed: int = 0) -> ir.Model:
    """A model from text in which ``R[2,3] w`` is a random weight; its size keeps values around one."""
    rng = np.random.default_rng(seed)

    def weight(match: re.Match[str]) -> str:
        shape = [int(d) for d in match[1].split(",")]
        fan = max(1, int(np.prod(shape)) // shape[0]) if len(shape) > 2 else shape[0]
        array = rng.standard_normal(shape) / np.sqrt(fan)
        numbers = ",".join(f"{v:.5f}" for v in array.ravel())
        return f"float[{match[1]}] {match[2]} = {{{numbers}}}"

    model = from_text(re.sub(r"R\[([\d,]+)\] (\w+)", weight, text))
    for node in model.graph:
        node.name = f"make {node.outputs[0].name}"
    return model


def samples(model: ir.Model, count: int = 24) -> Feeds:
    return Feeds(tuple(feed_for(model, k, batch=1) for k in range(count)), "made", True)


def dropped(
    model: ir.Model, feeds: Feeds | None = None, **options: object
) -> tuple[ir.Model, PassLog, int]:
    """A cleaned, checked copy after the pass, its log, and the number of changes."""
    copy, ctx = model.clone(), context(feeds or samples(model))
    changes = PruneBlocks(**options).run(copy, ctx)
    clean(copy)
    io.check(copy)
    return copy, ctx.log, changes


def reasons(log: PassLog) -> dict[str, str]:
    return dict(log.skipped)


def without(text: str, *edits: tuple[str, str]) -> ir.Model:
    """The model with some of its text replaced."""
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    model = built(text)
    clean(model)
    return model


def join_names(model: ir.Model) -> dict[str, str]:
    """The name of the node that makes each value."""
    return {o.name or "": n.name or "" for n in model.graph for o in n.outputs}


def same(a: ir.Model, b: ir.Model) -> None:
    feed = feed_for(a, 5, batch=3)
    for want, got in zip(outputs(a, feed), outputs(b, feed), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def zeroed(model: ir.Model, *names: str) -> ir.Model:
    for name in names:
        value = model.graph.initializers[name]
        array = constant(value)
        assert array is not None
        value.const_value = ir.tensor(np.zeros_like(array), name=name)
    return model


def test_blocks_of_a_residual_network() -> None:
    model = built(CNN)
    found = {b.out.name: b for b in blocks(model)}
    assert list(found) == ["a1", "a2", "a3", "a4"]
    assert [b.reason for b in found.values()] == [
        "",
        "",
        "its shortcut is a projection, not the block's input",
        "",
    ]
    assert [found[n].side for n in ("a1", "a2", "a4")] == [0, 1, 0]
    assert [(b.axis, b.rank) for b in found.values()] == [(1, 4)] * 4
    assert found["a1"].macs == 4 * 4 * 9 * 36


def test_a_dropped_block_is_its_shortcut() -> None:
    model = zeroed(built(CNN), "w2", "b2")
    copy, _, changes = dropped(model, count=1)
    assert changes == 1
    assert op_counts(copy)["Conv"] == op_counts(model)["Conv"] - 1
    same(model, copy)  # the branch was zero


def test_dropping_is_what_the_text_says() -> None:
    model = built(CNN)
    name = join_names(model)["a1"]
    copy, log, changes = dropped(model, count=1, repair=False, targets=[name])
    assert changes == 1
    assert [t for t, _ in log.touched] == [name]
    if "mean stays" in log.touched[0][1]:
        # mean of the branch over the samples, in its place
        branch = without(CNN, ("(float[batch,3] y)", "(float[batch,4,6,6] c1)"))
        seen = np.concatenate([outputs(branch, f)[0] for f in samples(model)])
        mean = seen.mean((0, 2, 3))
        text = re.sub(r"c1 = Conv<[^>]*>\(r0, w1, b1\)  a1 = Add\(c1, r0\)", "a1 = Add(c, r0)", CNN)
        numbers = ",".join(f"{v:.6f}" for v in mean)
        text = text.replace("R[8,3] head", f"R[8,3] head, float[4,1,1] c = {{{numbers}}}")
        same(built(text), copy)
    else:
        same(
            without(
                CNN,
                ("c1 = Conv<pads = [1,1,1,1]>(r0, w1, b1)  a1 = Add(c1, r0)", "a1 = Identity(r0)"),
            ),
            copy,
        )


def test_a_constant_branch_is_replaced_exactly() -> None:
    model = zeroed(built(CNN), "w1")  # the bias is left
    copy, log, _ = dropped(model, count=1, repair=False)
    assert log.touched[0][0] == join_names(model)["a1"]
    assert "mean stays" in log.touched[0][1]
    same(model, copy)
    assert log.notes["error"] < 1e-6


def test_layers_before_and_behind_make_up_for_a_block() -> None:
    model, errors = built(CNN, 3), {}
    feeds = samples(model, 64)
    for repair in (False, True):
        copy, log, _ = dropped(model, feeds, count=2, repair=repair)
        feed = feed_for(model, 999, batch=64)
        errors[repair] = rel_l2(outputs(model, feed)[0], outputs(copy, feed)[0])
        assert log.notes["error"] <= log.notes["error_without_repair"]
    assert errors[True] < 0.9 * errors[False]


def test_the_layer_before_learns_a_linear_branch() -> None:
    """Without anything nonlinear in a block, the layer before it can do all that it did."""
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[batch,4] x) => (float[batch,4] y)
        <R[4,4] w0, R[4] b0, R[4,4] w1, R[4] b1, R[4,4] w2>
        { h = Gemm(x, w0, b0)  m = Gemm(h, w1, b1)  a = Add(h, m)  t = Tanh(a)  y = MatMul(t, w2) }"""
    model = built(text)
    copy, _, changes = dropped(model, samples(model, 200), count=1)
    assert changes == 1
    assert op_counts(copy) == {"Gemm": 1, "Tanh": 1, "MatMul": 1}
    feed = feed_for(model, 77, batch=50)
    assert rel_l2(outputs(model, feed)[0], outputs(copy, feed)[0]) < 2e-3


@pytest.mark.parametrize("text", [PRE_NORM, POST_NORM])
def test_transformer_layers(text: str) -> None:
    model = built(text)
    found = blocks(model)
    assert [(b.out.name, b.reason, b.attends, b.axis) for b in found] == [
        ("a", "", True, -1),
        ("b", "", False, -1),
    ]
    assert [[b.out.name for b in unit] for unit in layers(found)] == [["a", "b"]]
    copy, log, changes = dropped(model, unit="layer", count=1, repair=False)
    assert changes == 2
    assert "Softmax" not in op_counts(copy)
    assert {t for t, _ in log.touched} == {b.name for b in found}
    assert all(np.isfinite(o).all() for o in outputs(copy, feed_for(model)))


@pytest.mark.parametrize("text", [PRE_NORM, POST_NORM])
def test_branches_of_zero_go_without_a_trace(text: str) -> None:
    model = zeroed(built(text), "o")
    copy, log, changes = dropped(model, count=1)
    assert changes == 1
    assert log.touched[0][0] == blocks(model)[0].name
    assert "Softmax" not in op_counts(copy)
    same(model, copy)


@pytest.mark.parametrize(("weights", "join"), [(("w1",), "n1"), (("down",), "n2")])
def test_skip_norms(weights: tuple[str, ...], join: str) -> None:
    model = zeroed(built(SKIP_NORM), *weights)
    copy, log, changes = dropped(model, count=1, repair=False)
    assert changes == 1
    assert log.touched[0][0] == join_names(model)[join]
    counts = op_counts(copy)
    assert counts["SkipLayerNormalization"] == counts["LayerNormalization"] == 1
    same(model, copy)


def test_skip_norms_need_a_norm_to_become() -> None:
    model = without(SKIP_NORM, ('"": 17', '"": 16'))
    assert {b.reason for b in blocks(model)} == {
        "LayerNormalization needs opset 17: convert_opset before it"
    }


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (("y = MatMul(p, head)", "z = MatMul(p, head)  c = ReduceMean<axes = [2,3], keepdims = 0>(c5)"
          "  m = MatMul(c, head)  y = Add(z, m)"), "what is inside is read elsewhere too"),
        (("a4 = Add(c5, r3)", "f = ReduceMean<axes = [2,3], keepdims = 1>(r3)"
          "  c6 = Conv(f, w5)  a4 = Add(c5, r3)"), ""),
        (("a4 = Add(c5, r3)", "k = GlobalAveragePool(r3)  c6 = Conv<pads = [1,1,1,1]>(r3, w5)"
          "  c7 = Relu(c6)  c8 = Conv<pads = [1,1,1,1]>(k, w5)  a4 = Add(c8, k)"), ""),
        (("a4 = Add(c5, r3)", "k = GlobalAveragePool(r3)  c6 = Conv<pads = [1,1,1,1]>(k, w5)"
          "  o = Add(c5, c6)  c7 = Mul(k, o)  a4 = Add(k, c7)"),
         "its shortcut and its output may differ in shape"),
    ],
)  # fmt: skip
def test_reasons_to_stay(edit: tuple[str, str], reason: str) -> None:
    model = without(CNN, edit)
    assert blocks(model)[-1].reason == reason


def test_only_joins_of_layers_count() -> None:
    """The polynomial inside a GELU adds to a value what is made of it, too."""
    model = built("""<ir_version: 8, opset_import: ["": 17]>
        g (float[batch,4] x) => (float[batch,4] y) <R[4,4] w, float three = {3}>
        { h = MatMul(x, w)  p = Pow(h, three)  a = Add(h, p)  y = Tanh(a) }""")
    assert blocks(model) == []


def test_goals() -> None:
    model = built(CNN)
    before = model_cost(model).macs
    copy, _, _ = dropped(model, macs=0.8)
    assert model_cost(copy).macs <= 0.8 * before
    _, log, changes = dropped(model, macs=0.1)
    assert changes == 0
    assert "10% are asked for" in reasons(log)["model"]
    _, log, changes = dropped(model, count=7)
    assert changes == 0
    assert reasons(log)["model"] == "7 are to go, but only 3 may"
    _, log, changes = dropped(model, error=1e-7)
    assert changes == 0
    assert "above 1e-07" in " ".join(reasons(log).values())
    copy, log, changes = dropped(zeroed(built(CNN), "w2", "b2"), error=1e-7)
    assert changes == 1


def test_the_limit_bounds_what_another_goal_asks_for() -> None:
    model = zeroed(built(CNN), "w2", "b2")
    _, log, changes = dropped(model, count=3, error=1e-5)
    assert changes == 1
    assert log.notes["error"] <= 1e-5
    with pytest.raises(ValueError, match="exclude each other"):
        PruneBlocks(count=1, macs=0.5)


def test_targets_and_ignore() -> None:
    model = built(CNN)
    names = join_names(model)
    assert PruneBlocks(targets=[names["c2"]]).candidates(model, context()) == [names["a2"]]
    left = PruneBlocks(ignore=[names["c2"]]).candidates(model, context())
    assert left == [names["a1"], names["a4"]]


def test_without_data_nothing_goes() -> None:
    model, ctx = built(CNN), context()
    assert PruneBlocks(count=1).run(model, ctx) == 0
    assert "only data tells" in " ".join(r for _, r in ctx.log.skipped)


def test_a_block_that_ends_the_model() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[batch,4] x) => (float[batch,4] y) <R[4,4] w>
        { m = MatMul(x, w)  y = Add(x, m) }"""
    model = zeroed(built(text), "w")
    copy, _, changes = dropped(model, count=1)
    assert changes == 1
    assert [v.name for v in copy.graph.outputs] == ["y"]
    same(model, copy)


def test_blocks_inside_a_block() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[batch,4] x) => (float[batch,4] y) <R[4,4] w0, R[4,4] w1, R[4,4] w2, R[4,4] w3>
        { h = MatMul(x, w0)  t = Tanh(h)  m = MatMul(t, w1)  n = Tanh(m)  k = MatMul(n, w2)
          inner = Add(m, k)  outer = Add(t, inner)  y = MatMul(outer, w3) }"""
    model = built(text)
    assert [b.out.name for b in blocks(model)] == ["inner", "outer"]
    copy, _, _ = dropped(zeroed(built(text), "w1"), count=1, repair=False)
    assert op_counts(copy) == {"MatMul": 2, "Tanh": 1}
    copy, _, _ = dropped(model, count=2, repair=False)
    assert op_counts(copy)["MatMul"] == 2


class FakeClock:
    """Says that milliseconds are millions of multiply-accumulates."""

    def __init__(self, model: ir.Model, ctx: Context) -> None:
        self.model = model

    def both(self, other: ir.Model) -> tuple[SimpleNamespace, ...]:
        return self._profile(self.model), self._profile(other)

    def ratio(self, other: ir.Model) -> float:
        first, second = self.both(other)
        return second.wall_ms / first.wall_ms

    def _profile(self, model: ir.Model) -> SimpleNamespace:
        nodes = [
            SimpleNamespace(origin=[c.name], near=[], ms=c.macs / 1e6)
            for c in model_cost(model).per_node
            if c.macs
        ]
        return SimpleNamespace(wall_ms=sum(n.ms for n in nodes), nodes=nodes)


def test_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_block_cost, "Clock", FakeClock)
    model = built(CNN)
    copy, log, changes = dropped(model, latency=0.9)
    assert changes > 0
    assert model_cost(copy).macs <= 0.92 * model_cost(model).macs
    assert log.notes["latency_planned"] <= 0.92
    _, log, changes = dropped(model, latency=0.1)
    assert changes == 0
    assert "10% are asked for" in reasons(log)["model"]


def test_digits_transformer() -> None:
    """One block of a trained transformer goes, and hardly an answer changes."""
    model = io.load(SAMPLES / "digits_transformer.onnx")
    feeds = load_npz(SAMPLES / "digits_transformer.calib.npz", model).first(48)
    with np.load(SAMPLES / "digits_transformer.test.npz") as file:
        test = {"rows": file["rows"][:120]}
    right = outputs(model, test)[0].argmax(1)
    copy, log, changes = dropped(model, feeds, count=1)
    assert changes == 1
    assert model_cost(copy).macs < 0.95 * model_cost(model).macs
    assert log.notes["error"] < 0.1
    assert (outputs(copy, test)[0].argmax(1) == right).mean() > 0.95
