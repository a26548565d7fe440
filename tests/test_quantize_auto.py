"""quantize_auto: each way does what its own pass does, and both together leave nothing out."""

import numpy as np
import onnx_ir as ir
import pytest

from effdl.data.feeds import Feeds
from effdl.graph.clean import clean
from effdl.passes.quantize.auto import Form, QuantizeAuto
from tests.support import context, feed_for, op_counts, outputs, rel_l2
from tests.test_quantize_static import fill

BOTH = """<ir_version: 8, opset_import: ["": 13]>
g (float[N,8,12,12] x) => (float[N,144,64] y)
<float[64,8,3,3] w1, float[64] b1, float[64,64,3,3] w2, float[64] b2, float[64,64] m1, float[64,64] m2> {
  c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
  r1 = Relu(c1)
  c2 = Conv<pads=[1,1,1,1]>(r1, w2, b2)
  s = Constant<value_ints = [0, 64, -1]>()
  f = Reshape(c2, s)
  t = Transpose<perm = [0,2,1]>(f)
  h = MatMul(t, m1)
  e = Erf(h)
  y = MatMul(e, m2)
}"""


def samples(model: ir.Model) -> Feeds:
    return Feeds([feed_for(model, seed, N=1) for seed in range(10)], "test", True)


def done(model: ir.Model, form: Form, feeds: Feeds | None) -> tuple[ir.Model, dict[str, int]]:
    after = model.clone()
    ctx = context(feeds)
    changes = QuantizeAuto(form=form).run(after, ctx)
    clean(after)
    if changes:
        feed = feed_for(model, 77, N=1)
        assert 0 < rel_l2(outputs(model, feed)[0], outputs(after, feed)[0]) < 0.08
        names = {name for name, _ in ctx.log.touched}
        assert not names & {name for name, _ in ctx.log.skipped}
    return after, op_counts(after)


def test_the_ways() -> None:
    assert [v.form for v in QuantizeAuto().variants()] == ["static", "dynamic", "mixed"]  # type: ignore[attr-defined]
    assert QuantizeAuto(form="static").variants() == (QuantizeAuto(form="static"),)


@pytest.mark.parametrize(
    ("form", "integers", "pairs"), [("static", 0, True), ("dynamic", 2, False), ("mixed", 2, True)]
)
def test_each_way(form: Form, integers: int, pairs: bool) -> None:
    model = fill(BOTH)
    _, counts = done(model, form, samples(model))
    assert counts.get("MatMulInteger", 0) == integers
    assert ("QuantizeLinear" in counts) == pairs


def test_auto_without_a_race() -> None:
    model = fill(BOTH)
    data = samples(model)
    assert done(model, "auto", data)[1] == done(model, "mixed", data)[1]
    assert done(model, "auto", None)[1] == done(model, "dynamic", None)[1]
    for form in ("static", "mixed"):
        ctx = context(None)
        assert QuantizeAuto(form=form).run(model.clone(), ctx) == 0
        assert "calibration data" in ctx.log.skipped[0][1]


def test_notes_of_both_ways_are_told() -> None:
    model = fill(BOTH)
    ctx = context(samples(model))
    QuantizeAuto(form="mixed").run(model, ctx)
    assert "Conv 2" in str(ctx.log.notes["quantized"])
    assert "MatMul 2" in str(ctx.log.notes["quantized"])


def test_candidates_are_those_of_any_way() -> None:
    model = fill(BOTH)
    names = QuantizeAuto().candidates(model, context())
    assert names is not None
    kinds = {n.name or n.op_type: n.op_type for n in model.graph}
    assert {"Conv", "MatMul"} <= {kinds[n] for n in names}


def test_options_reach_both() -> None:
    model = fill(BOTH)
    for node, name in zip(model.graph, "abcdefghijk", strict=False):
        node.name = name
    first = next(n for n in model.graph if n.op_type == "MatMul")
    step = QuantizeAuto(form="mixed", ignore=("Conv", first.name or ""))
    after = model.clone()
    assert step.run(after, context(samples(model))) == 1
    assert op_counts(after).get("MatMulInteger") == 1
    assert np.isfinite(outputs(after, feed_for(model, 1, N=1))[0]).all()
