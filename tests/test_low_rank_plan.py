"""Plans for a whole model, with times that the test makes up, and the timing of layers itself."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from effdl.data.feeds import Feeds
from effdl.errors import ModelError
from effdl.graph.cost import model_cost
from effdl.graph.shapes import infer
from effdl.measure import layer_times
from effdl.measure.layer_times import Piece, cannot_time, cut, times, try_times
from effdl.passes import _low_rank_survey
from effdl.passes.low_rank import LowRank
from effdl.runtime.session import open_session
from effdl.runtime.target import parse_target
from tests.support import context, from_text, outputs, rel_l2, run_pass

HEAD = '<ir_version: 8, opset_import: ["": 17]> '


def network() -> ir.Model:
    """Three layers with weights of low rank and noise; the second has most MACs."""
    model = from_text(
        HEAD
        + """g (float[n,3,12,12] x, float[32,3,3,3] A, float[32] a, float[48,32,3,3] B, float[48] b,
               float[16,48,1,1] C) => (float[n,16,12,12] y) {
          [one] h = Conv<pads=[1,1,1,1]>(x, A, a)  r = Relu(h)
          [two] k = Conv<pads=[1,1,1,1]>(r, B, b)  s = Relu(k)
          [three] y = Conv(s, C) }"""
    )
    rng = np.random.default_rng(3)
    for value in list(model.graph.inputs)[1:]:
        assert value.shape is not None
        shape = value.shape.numpy()
        array = rng.standard_normal(shape) * 0.3
        if len(shape) == 4:
            thin = rng.standard_normal((shape[0], 4)) @ rng.standard_normal((4, array[0].size))
            array = array * 0.2 + thin.reshape(shape)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array.astype(np.float32), name=value.name)
        model.graph.register_initializer(value)
    return model


def samples() -> Feeds:
    rng = np.random.default_rng(0)
    batches = ({"x": rng.random((4, 3, 12, 12), np.float32)} for _ in range(12))
    return Feeds(tuple(batches), "made", True)


def by_macs(share: float) -> object:
    """Times as MACs would have it, but for a part that every kernel costs."""

    def made(pieces, target, *, seconds):
        found = []
        for piece in pieces:
            nodes = sum(1 for n in piece.model.graph if n.op_type == "Conv")
            found.append(((model_cost(piece.model).macs or 0) / 1e6 + share * nodes) * 1.0)
        return found, ""

    return made


@pytest.mark.parametrize("share", [0.7, 0.5])
def test_macs_of_the_model_are_kept_with_the_least_error(share: float) -> None:
    before, feeds = network(), samples()
    model = before.clone()
    changes, log = run_pass(LowRank(macs=share, measure=False, multiple_of=4), model, feeds=feeds)
    assert changes
    whole = model_cost(before).macs or 0
    assert share * whole * 0.6 < (model_cost(model).macs or 0) <= share * whole
    feed = {"x": feeds.batches[0]["x"]}
    assert rel_l2(outputs(before, feed)[0], outputs(model, feed)[0]) < 0.2
    assert all("output error" in what for _, what in log.touched)
    without = before.clone()
    run_pass(LowRank(macs=share, measure=False, multiple_of=4), without)
    errors = [rel_l2(outputs(before, feed)[0], outputs(m, feed)[0]) for m in (model, without)]
    assert errors[0] < errors[1]
    assert LowRank(macs=share, measure=False, multiple_of=4).run(model, context(feeds)) == 0


def test_time_of_the_model_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_low_rank_survey, "try_times", by_macs(0.0))
    before = network()
    model = before.clone()
    changes, log = run_pass(LowRank(latency=0.6, multiple_of=4), model, feeds=samples())
    assert changes
    whole, now = (model_cost(m).macs or 0 for m in (before, model))
    assert now <= 0.6 * whole * 1.001
    reasons = {"the plan spends no error on it"}
    assert {
        w for _, w in log.skipped if "would take" not in w and "allows rank" not in w
    } <= reasons


@pytest.mark.parametrize("goal", [{}, {"latency": 0.6}, {"macs": 0.6}])
def test_what_is_not_faster_is_declined_with_numbers(
    monkeypatch: pytest.MonkeyPatch, goal: dict[str, float]
) -> None:
    monkeypatch.setattr(_low_rank_survey, "try_times", by_macs(100.0))
    model = network()
    changes, log = run_pass(LowRank(multiple_of=4, **goal), model, feeds=samples())
    assert changes == 0
    assert "ms, the layer takes" in dict(log.skipped)["two"]


def test_what_the_model_does_not_feel_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(pieces, target, *, seconds):
        found = []
        for piece in pieces:
            whole = any(n.op_type == "Relu" for n in piece.model.graph)
            found.append(50.0 if whole else (model_cost(piece.model).macs or 0) / 1e7)
        return found, ""

    monkeypatch.setattr(_low_rank_survey, "try_times", made)
    changes, log = run_pass(LowRank(multiple_of=4), network(), feeds=samples())
    assert changes == 0
    assert "all layers together would save" in dict(log.skipped)["two"]
    assert "of 50 ms, less than 3%" in dict(log.skipped)["two"]


def test_where_nothing_can_be_timed_macs_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(pieces, target, *, seconds):
        return None, "no machine"

    monkeypatch.setattr(_low_rank_survey, "try_times", refused)
    monkeypatch.setattr(_low_rank_survey, "cannot_time", lambda target: "no machine")
    model = network()
    changes, log = run_pass(LowRank(multiple_of=4), model, feeds=samples())
    assert changes
    assert log.notes["not_timed"] == "no machine"
    assert all(float(w.split(": ")[1].split("%")[0]) <= 60 for _, w in log.touched)
    model = network()
    _, log = run_pass(LowRank(latency=0.7, multiple_of=4), model, feeds=samples())
    assert "share of the MACs" in str(log.notes["latency"])


def test_the_second_layer_is_fitted_to_what_the_first_now_gives() -> None:
    before, feeds = network(), samples()
    feed = {"x": np.concatenate([b["x"] for b in feeds])}
    want = outputs(before, feed)[0]
    errors = {}
    for refit in (False, True):
        model = before.clone()
        options = {"ratio": 0.35, "multiple_of": 2, "refit": refit, "ignore": ("three",)}
        changes, log = run_pass(LowRank.model_validate(options), model, feeds=feeds)
        assert changes == 2
        errors[refit] = rel_l2(want, outputs(model, feed)[0])
    assert log.notes["layers_fitted"]
    assert errors[True] < errors[False]


def test_a_piece_computes_what_the_model_does() -> None:
    model = network()
    nodes = [n for n in model.graph if n.name in ("two",) or n.op_type == "Relu"][:2]
    piece = cut(model, nodes, infer(model, {"n": 2}))
    assert piece is not None
    assert {n: a.shape for n, a in piece.feed.items()} == {"h": (2, 32, 12, 12)}
    got = open_session(piece.model).run(piece.feed)
    assert list(got) == ["k"]
    relu = np.maximum(piece.feed["h"], 0)
    alone = cut(model, nodes[1:], infer(model, {"n": 2}))
    assert alone is not None
    want = open_session(alone.model).run({"r": relu})["k"]
    np.testing.assert_allclose(got["k"], want, rtol=1e-4, atol=1e-4)
    assert cut(model, nodes, infer(model)) is None


def test_times_come_in_the_order_of_the_pieces() -> None:
    model = network()
    shapes = infer(model, {"n": 4})
    pieces = [cut(model, [n], shapes) for n in model.graph if n.op_type == "Conv"]
    kept = [p for p in pieces if p is not None]
    assert len(kept) == 3
    target = parse_target("cpu", 1)
    found, reason = try_times(kept, target, seconds=0.02)
    assert reason == ""
    assert found is not None
    assert len(found) == 3
    assert all(ms > 0 for ms in found)
    assert times([], target) == []
    broken = from_text(HEAD + "g (float[2] x) => (float[2] y) { y = Relu(x) }")
    with pytest.raises(ModelError):
        times([Piece(broken, {"z": np.zeros(2, np.float32)})], target, seconds=0.01)
    assert try_times([Piece(broken, {"z": np.zeros(2, np.float32)})], target)[0] is None


def test_a_target_that_is_not_here_is_not_timed() -> None:
    away = parse_target("arm")
    if away.here:
        pytest.skip("this is an Arm machine")
    assert cannot_time(away)
    assert layer_times.try_times([], away) == (None, cannot_time(away))
