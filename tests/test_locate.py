"""Where two models part: counterparts, the first difference, and what hurts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from effdl import api
from effdl.data.feeds import Feeds
from effdl.data.random import random_feeds
from effdl.errors import DataError, UsageError
from effdl.graph import io
from effdl.measure import parting
from effdl.measure.counterparts import Pair, counterparts, reading, unrounded
from effdl.measure.locate import at_fault, first_divergence, locate, worst
from effdl.measure.taps import chunks, sizes
from effdl.passes.convert.float16 import ConvertFloat16
from effdl.passes.fold.batchnorm import FoldBatchnorm
from effdl.passes.quantize.static import QuantizeStatic
from effdl.runtime.session import open_session
from tests.support import SAMPLES, context, from_text

F = np.float32
HEAD = '<ir_version: 8, opset_import: ["": 17]>'
CNN = SAMPLES / "digits_cnn.onnx"


def dense(
    *steps: tuple[str, ...], renamed: str = "", scale: dict[str, float] | None = None
) -> ir.Model:
    """A chain of nodes (op, name, inputs..., output); weights w0.. are given by their name.

    Args:
        steps: the nodes.
        renamed: a prefix for the names of nodes and inner tensors.
        scale: factors for weights, to plant a fault.
    """
    weights: dict[str, np.ndarray] = {}
    nodes = []
    rng = np.random.default_rng(7)
    pool = {f"w{k}": rng.standard_normal((4, 4)).astype(F) for k in range(4)}
    for op, name, *rest in steps:
        inputs, output = rest[:-1], rest[-1]
        for i in inputs:
            if i in pool:
                weights[i] = pool[i] * F((scale or {}).get(i, 1.0))
        rename = [i if i in weights or i == "x" else renamed + i for i in inputs]
        goal = output if output == "y" else renamed + output
        nodes.append(helper.make_node(op, rename, [goal], name=renamed + name))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(w, n) for n, w in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return io.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8), "t", None)


CHAIN = (
    ("MatMul", "fc0", "x", "w0", "a"),
    ("Relu", "act0", "a", "b"),
    ("MatMul", "fc1", "b", "w1", "c"),
    ("Tanh", "act1", "c", "d"),
    ("MatMul", "fc2", "d", "w2", "y"),
)


def feeds(count: int = 3) -> Feeds:
    rng = np.random.default_rng(0)
    batches = tuple({"x": rng.standard_normal((2 + k, 4)).astype(F)} for k in range(count))
    return Feeds(batches, "random", False)


def names(pairs: tuple[Pair, ...]) -> list[tuple[str | None, str | None]]:
    return [(p.value.name, p.other.name) for p in pairs]


def test_a_model_does_not_part_from_itself() -> None:
    report = locate(dense(*CHAIN), dense(*CHAIN), feeds())
    assert report.first is None
    assert report.jumps == ()
    assert (report.compared, report.unmatched, report.notes) == (5, 0, ())
    assert (report.feeds, report.source, report.real) == (3, "random", False)


def test_the_first_difference_is_named_with_its_nodes() -> None:
    report = locate(dense(*CHAIN), dense(*CHAIN, scale={"w1": 1.01}), feeds())
    first = report.first
    assert first is not None
    assert (first.tensor, first.node, first.op_type) == ("c", "fc1", "MatMul")
    assert (first.other, first.other_node, first.other_op) == ("c", "fc1", "MatMul")
    assert first.error == pytest.approx(0.01, rel=1e-3)
    assert first.inputs == (("b", 0.0),)
    assert first.alone == pytest.approx(0.01, rel=1e-3)
    assert first.unrounded is None
    assert (first.nodes, first.readers) == (("fc1",), ("act1",))
    # Only one node is at fault, so what it does alone is all that happens.
    assert [j.node for j in report.jumps] == ["fc1"]
    whole = api.compare(dense(*CHAIN), dense(*CHAIN, scale={"w1": 1.01}), samples=3)
    assert worst(report, 3)[0][:2] == ("fc1", "MatMul")
    assert 0 < worst(report, 3)[0][2] < 0.02
    assert not whole.equal


def test_effects_are_those_of_models_with_one_fault_each() -> None:
    """What a step does alone equals what a model does whose other layers are right."""
    both = locate(dense(*CHAIN), dense(*CHAIN, scale={"w0": 1.02, "w2": 0.97}), feeds())
    found = {j.node: j.effect for j in both.jumps}
    assert set(found) == {"fc0", "fc2"}
    for layer, weight, factor in (("fc0", "w0", 1.02), ("fc2", "w2", 0.97)):
        one = dense(*CHAIN, scale={weight: factor})
        gap, size = 0.0, 0.0
        for feed in feeds():
            right = open_session(dense(*CHAIN)).run(feed)["y"].astype(np.float64)
            gap += float(((open_session(one).run(feed)["y"] - right) ** 2).sum())
            size += float((right**2).sum())
        assert found[layer] == pytest.approx(np.sqrt(gap / size), rel=1e-3)
    errors = {j.node: j for j in both.jumps}
    assert errors["fc2"].alone == pytest.approx(0.03, rel=1e-3)
    assert errors["fc2"].error < 0.029  # in the candidate the two make up for each other a little


def test_other_names_are_matched_by_structure() -> None:
    wanted, other = dense(*CHAIN), dense(*CHAIN, renamed="export/", scale={"w1": 1.01})
    pairs, lost = counterparts(wanted, other)
    assert names(pairs) == [(t, f"export/{t}") for t in "abcd"] + [("y", "y")]
    assert lost == ()
    first = locate(wanted, other, feeds()).first
    assert first is not None
    assert (first.node, first.other_node) == ("fc1", "export/fc1")


BRANCHES = (
    ("MatMul", "left", "x", "w0", "a"),
    ("MatMul", "right", "x", "w1", "b"),
    ("Sub", "join", "a", "b", "y"),
)


def test_branches_alike_are_told_apart_by_their_weights() -> None:
    swapped = (
        ("MatMul", "one", "x", "w1", "p"),
        ("MatMul", "two", "x", "w0", "q"),
        ("Sub", "three", "q", "p", "y"),
    )
    pairs, _ = counterparts(dense(*BRANCHES), dense(*swapped))
    assert names(pairs) == [("a", "q"), ("b", "p"), ("y", "y")]
    same = (("MatMul", "left", "x", "w0", "a"), ("MatMul", "right", "x", "w0", "b"))
    pairs, lost = counterparts(
        dense(*same, ("Sub", "join", "a", "b", "y")),
        dense(*same, ("Sub", "join", "a", "b", "y"), renamed="n/"),
    )
    assert names(pairs) == [("y", "y")]  # it cannot be told which is which
    assert [v.name for v in lost] == ["a", "b"]


def test_identity_and_cast_are_seen_through() -> None:
    other = from_text(
        f"""{HEAD} g (float[N,4] x) => (float[N,4] y)
        {{ i = Identity(x) h = Cast<to=10>(i) e = Exp(h) j = Identity(e) k = Cast<to=1>(j)
           y = Neg(k) }}"""
    )
    wanted = from_text(f"{HEAD} g (float[N,4] x) => (float[N,4] y) {{ z = Exp(x) y = Neg(z) }}")
    pairs, lost = counterparts(wanted, other)
    assert names(pairs) == [("z", "e"), ("y", "y")]
    assert lost == ()
    report = locate(wanted, other, feeds())
    assert report.first is not None  # y is float32 in both: half precision is beyond its tolerance
    assert report.first.tensor == "y"
    assert locate(wanted, other, feeds(), rtol=1e-2).first is None


def test_a_folded_batch_norm_is_not_taken_for_a_difference() -> None:
    model = io.load(CNN)
    folded = model.clone()
    assert FoldBatchnorm().run(folded, context()) > 0
    data = random_feeds(model, count=2)
    report = locate(model, folded, data)
    assert report.first is None
    spoiled = folded.clone()
    conv = [n for n in spoiled.graph if n.op_type == "Conv"][-1]
    weight = conv.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy() * F(1.05), name=weight.name)
    first = locate(model, spoiled, data).first
    assert first is not None
    assert first.other_node == conv.name
    assert conv.name in first.nodes


def test_a_tensor_that_means_something_else_is_left_out() -> None:
    moved = (
        ("MatMul", "fc0", "x", "w0", "a"),
        ("Relu", "act0", "a", "b"),
        ("Neg", "minus", "b", "c"),  # c was something else
        ("Neg", "plus", "c", "c2"),
        ("MatMul", "fc1", "c2", "w1", "c3"),
        ("Tanh", "act1", "c3", "d"),
        ("MatMul", "fc2", "d", "w2", "y"),
    )
    report = locate(dense(*CHAIN), dense(*moved), feeds())
    assert report.first is None
    assert report.notes == ("left out, since all behind agrees: 1 tensor, such as 'c'",)
    # The same in a model that really differs behind it.
    report = locate(dense(*CHAIN), dense(*moved, scale={"w2": 1.1}), feeds())
    assert report.first is not None
    assert report.first.tensor == "y"


def test_float16_is_compared_by_value() -> None:
    half = io.load(CNN)
    assert ConvertFloat16().run(half, context()) > 0
    model = io.load(CNN)
    report = locate(model, half, random_feeds(model, count=1))
    assert report.first is not None  # float32 in both, so it is held to the tolerance of float32
    assert (report.first.tensor, report.first.tolerance) == ("logits", 1e-4)
    assert locate(model, half, random_feeds(model, count=1), rtol=1e-2).first is None
    assert report.compared > 5
    assert report.jumps
    assert all(j.error < 1e-2 for j in report.jumps)


@pytest.fixture(scope="module")
def quantized() -> tuple[ir.Model, ir.Model, Feeds]:
    model = io.load(CNN)
    FoldBatchnorm().run(model, context())
    data = random_feeds(model, count=4)
    after = model.clone()
    assert QuantizeStatic().run(after, context(data)) > 0
    return model, after, data


def test_quantized_tensors_are_compared_as_they_are_read(
    quantized: tuple[ir.Model, ir.Model, Feeds],
) -> None:
    model, after, data = quantized
    report = locate(model, after, data)
    first = report.first
    assert first is not None
    assert (first.tensor, first.node) == ("image", "")
    assert first.reason == ""
    (other,) = [v for v in after.graph.inputs if v.name == "image"]
    how = reading(other)
    assert how.scale is not None
    wanted = [f["image"].astype(np.float64) for f in data]
    rounded = [
        (np.clip(np.rint(w / how.scale) + how.zero, 0, 255) - how.zero) * how.scale for w in wanted
    ]
    gap = sum(float(((r - w) ** 2).sum()) for r, w in zip(rounded, wanted, strict=True))
    assert first.error == pytest.approx(
        np.sqrt(gap / sum(float((w**2).sum()) for w in wanted)), rel=1e-3
    )
    inner = [j for j in report.jumps if j.unrounded is not None]
    assert inner
    for jump in inner:
        assert jump.alone is not None
        assert jump.unrounded is not None
        assert jump.alone >= 0.9 * jump.unrounded
    assert set(at_fault(report)) <= {n.name for n in model.graph}
    # The steps' own effects, taken together, are about what all of them do.
    whole = locate(model, after, data, top=None)
    total = np.sqrt(sum((j.effect or 0) ** 2 for j in whole.jumps))
    outputs = api.compare(model, after, samples=4)
    assert total == pytest.approx(max(o.rel_l2 for o in outputs.outputs), rel=0.8)


def test_readers_are_at_fault_too_where_rounding_hurts(
    quantized: tuple[ir.Model, ir.Model, Feeds],
) -> None:
    report = locate(*quantized, top=None)
    relu = next(j for j in report.jumps if j.op_type == "Relu" and j.unrounded is not None)
    assert relu.alone is not None
    assert relu.unrounded is not None
    assert relu.unrounded < 0.1 * relu.alone  # a Relu computes nothing wrong
    found = at_fault(report)
    assert set(relu.readers) <= set(found)


def test_few_bytes_at_a_time_give_the_same(quantized: tuple[ir.Model, ir.Model, Feeds]) -> None:
    model, after, data = quantized
    whole, parts = locate(model, after, data), locate(model, after, data, max_bytes=1)
    assert whole.first == parts.first
    assert [(j.tensor, j.error) for j in whole.jumps] == [(j.tensor, j.error) for j in parts.jumps]
    for a, b in zip(whole.jumps, parts.jumps, strict=True):
        assert (a.alone, a.effect) == (pytest.approx(b.alone), pytest.approx(b.effect))


def test_chunks_are_bounded_and_sizes_exact() -> None:
    assert list(chunks(["a", "b", "c"], {"a": 3, "b": 3, "c": 9}, 6)) == [["a", "b"], ["c"]]
    model = dense(*CHAIN)
    (feed,) = feeds(1)
    assert sizes(model, ["a", "d"], feed, None) == {"a": 32, "d": 32}


def test_no_more_than_a_chunk_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []
    original = parting.tapped

    def tapped(model: ir.Model, wanted: list[str], *a: object, **k: object) -> object:
        fetched.append(len(wanted))
        return original(model, wanted, *a, **k)  # type: ignore[arg-type]

    monkeypatch.setattr(parting, "tapped", tapped)
    (feed,) = feeds(1)
    small = 2 * (2 * sizes(dense(*CHAIN), ["a"], feed, None)["a"])
    locate(dense(*CHAIN), dense(*CHAIN), feeds(1), max_bytes=small)
    assert fetched == [2, 2, 2, 2, 1, 1]


def test_another_shape_is_a_difference_unless_it_comes_back() -> None:
    flat = (*CHAIN[:3], ("Transpose", "turn", "c", "t"), ("Transpose", "back", "t", "c2"))
    rest = (("Tanh", "act1", "c2", "d"), CHAIN[4])
    report = locate(dense(*CHAIN), dense(*flat, *rest), feeds())
    assert report.first is None
    wider = from_text(
        f"{HEAD} g (float[N,4] x) => (float[M,4] y) {{ a = Concat<axis=0>(x, x) y = Neg(a) }}"
    )
    wanted = from_text(
        f"{HEAD} g (float[N,4] x) => (float[M,4] y) {{ a = Concat<axis=0>(x) y = Neg(a) }}"
    )
    first = locate(wanted, wider, feeds(1)).first
    assert first is not None
    assert first.tensor == "a"
    assert first.reason == "its shape is [4, 4], was [2, 4]"
    assert "Concat" in first_divergence(wanted, wider, feeds(1))


def test_nan_is_found_where_it_arises() -> None:
    wanted = from_text(
        f"{HEAD} g (float[N,4] x) => (float[M,4] y) {{ a = Abs(x) b = Sqrt(a) c = Exp(b) y = Neg(c) }}"
    )
    other = from_text(
        f"{HEAD} g (float[N,4] x) => (float[M,4] y) {{ a = Identity(x) b = Sqrt(a) c = Exp(b) y = Neg(c) }}"
    )
    first = locate(wanted, other, feeds(1)).first
    assert first is not None
    assert first.tensor == "a"
    other = from_text(
        f"""{HEAD} g (float[N,4] x) => (float[M,4] y)
        {{ a = Abs(x) m = Neg(a) b = Sqrt(m) c = Exp(b) y = Neg(c) }}"""
    )
    report = locate(wanted, other, feeds(1))
    assert report.first is not None
    assert report.first.tensor == "b"
    assert report.first.reason == "it is NaN where the reference is not"
    assert report.first.error == np.inf


def test_subgraphs_are_out_of_reach_and_said_so() -> None:
    text = """{head} g (float[N,4] x, bool k) => (float[N,4] y) {{
        s = Relu(x)
        z = If(k) <then_branch = t () => (float[N,4] p) {{ u = Exp(s) p = {op}(u) }},
                   else_branch = e () => (float[N,4] q) {{ q = Identity(s) }}>
        y = Neg(z) }}"""
    wanted, other = (from_text(text.format(head=HEAD, op=op)) for op in ("Abs", "Sqrt"))
    data = Feeds(({"x": np.ones((2, 4), F), "k": np.array(True)},), "random", False)
    report = locate(wanted, other, data)
    assert report.first is not None
    assert (report.first.tensor, report.first.op_type) == ("z", "If")
    assert report.first.inputs == (("s", 0.0),)
    assert report.notes == (
        "out of reach inside the reference's subgraphs: 3 tensors",
        "out of reach inside the candidate's subgraphs: 3 tensors",
    )


def test_types_that_numpy_has_not_are_left_out() -> None:
    text = f"""{HEAD} g (float[N,4] x) => (float[N,4] y)
        {{ b = Cast<to=16>(x) s = SequenceConstruct(x, x) i = Constant<value_int=0>()
           a = SequenceAt(s, i) z = Cast<to=1>(b) m = Exp(z) y = Add(a, m) }}"""
    report = locate(from_text(text), from_text(text.replace("Exp(z)", "Sin(z)")), feeds(1))
    assert report.first is not None
    assert report.first.tensor == "m"
    assert report.notes == ("left out, since numpy has not their type: 2 tensors",)


def test_integers_are_compared_exactly_and_have_no_effect() -> None:
    wanted = from_text(
        f"{HEAD} g (float[N,4] x) => (int64[N,1] y) {{ a = ArgMax<axis=1>(x) y = Neg(a) }}"
    )
    other = from_text(
        f"{HEAD} g (float[N,4] x) => (int64[N,1] y) {{ a = ArgMin<axis=1>(x) y = Neg(a) }}"
    )
    report = locate(wanted, other, feeds(1))
    assert report.first is not None
    assert (report.first.tensor, report.first.effect) == ("a", None)
    assert report.jumps == ()


def test_weights_that_are_graph_inputs() -> None:
    def with_inputs(model: ir.Model) -> ir.Model:
        model.graph.inputs.extend(model.graph.initializers.values())
        return model

    good, bad = with_inputs(dense(*CHAIN)), with_inputs(dense(*CHAIN, scale={"w2": 1.1}))
    report = locate(good, bad, feeds())
    assert [(j.node, j.alone) for j in report.jumps] == [("fc2", pytest.approx(0.1, rel=1e-3))]


QDQ = """<ir_version: 8, opset_import: ["": 17]> g (float[N,4] x) => (float[N,4] y)
    <float s = {{0.01}}, uint8 z = {{128}}> {{ a = Tanh(x) q = QuantizeLinear(a, s, z)
    {between} b = DequantizeLinear({last}, s, z) c = {op}(b) y = Neg(c) }}"""


@pytest.mark.parametrize(
    ("between", "last"),
    [("", "q"), ("i = Identity(q) j = Identity(i)", "j"), ("m = MaxPool1(q)", "m")],
)
def test_a_step_behind_a_rounded_tensor_gets_the_reference(between: str, last: str) -> None:
    """Also with an Identity between, and if the integers themselves are read."""
    between = between.replace("MaxPool1(q)", "Transpose<perm=[0,1]>(q)")
    wanted = from_text(
        f"{HEAD} g (float[N,4] x) => (float[N,4] y) {{ a = Tanh(x) c = Exp(a) y = Neg(c) }}"
    )
    other = from_text(QDQ.format(between=between, last=last, op="Exp"))
    jumps = {j.tensor: j for j in locate(wanted, other, feeds()).jumps}
    assert jumps["a"].unrounded == 0.0
    assert 0 < (jumps["a"].alone or 0) < 0.01
    if last == "m":  # the integers are read: what comes in is rounded once more
        assert 0 < (jumps["c"].alone or 0) < 0.01
    else:
        assert "c" not in jumps
    assert "y" not in jumps


def test_old_opsets_have_no_broadcasting_add() -> None:
    old = (
        from_text(
            f"""<ir_version: 3, opset_import: ["": 6]> g (float[2,4] x) => (float[2,4] y)
            {{ a = {op}(x) y = Neg(a) }}"""
        )
        for op in ("Exp", "Abs")
    )
    data = Feeds(({"x": np.ones((2, 4), F)},), "random", False)
    report = locate(*old, data)
    assert report.first is not None
    assert (report.first.tensor, report.jumps) == ("a", ())


def test_files_with_external_weights(tmp_path: Path) -> None:
    io.save(dense(*CHAIN), tmp_path / "a.onnx", external=True)
    io.save(dense(*CHAIN, scale={"w2": 1.1}), tmp_path / "b.onnx", external=True)
    report = locate(tmp_path / "a.onnx", tmp_path / "b.onnx", feeds())
    assert report.reference == str(tmp_path / "a.onnx")
    assert report.first is not None
    assert report.first.tensor == "y"
    assert worst(report, 1)[0][0] == "fc2"


def test_first_divergence_is_a_sentence() -> None:
    good, bad = dense(*CHAIN), dense(*CHAIN, scale={"w1": 1.5})
    text = first_divergence(good, bad, feeds())
    assert text == "first at 'c', made by MatMul 'fc1': relative error 0.5, 0 in what it reads"
    assert first_divergence(good, good, feeds()) == ""
    broken = from_text(
        f'{HEAD[:-2]}, "ai.odd": 1]> g (float[N,4] x) => (float[N,4] y) {{ y = ai.odd.Op(x) }}'
    )
    assert first_divergence(good, broken, feeds()) == ""


def test_without_feeds_there_is_nothing_to_say() -> None:
    with pytest.raises(DataError, match="no sample"):
        locate(dense(*CHAIN), dense(*CHAIN), Feeds((), "empty.npz", True))


def test_what_only_optimization_tells_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    original = parting.tapped
    bad = dense(*CHAIN, scale={"w1": 1.1})

    def tapped(model: ir.Model, *a: object, optimize: bool, **k: object) -> object:
        wrong = optimize and model.graph.name == "candidate"
        return original(bad if wrong else model, *a, optimize=optimize, **k)  # type: ignore[arg-type]

    from effdl.measure.locate import with_location
    from effdl.runtime.target import parse_target

    good, other = dense(*CHAIN), dense(*CHAIN)
    other.graph.name = "candidate"
    differs = api.compare(good, bad, samples=2)
    monkeypatch.setattr(parting, "tapped", tapped)
    report = with_location(differs, good, other, feeds(), parse_target("cpu"), None, 3)
    assert report.located is not None
    assert report.located.optimized
    assert "optimization" in report.located.notes[0]
    assert report.located.first is not None
    assert report.located.first.tensor == "c"


@pytest.mark.parametrize("flag", [True, False])
def test_api_locates_on_request(flag: bool) -> None:
    report = api.compare(dense(*CHAIN), dense(*CHAIN, scale={"w1": 1.1}), samples=2, locate=flag)
    assert (report.located is not None) == flag
    if report.located is not None:
        assert report.located.first is not None
        assert report.located.first.tensor == "c"


def test_locating_elsewhere_is_refused() -> None:
    with pytest.raises(UsageError, match="--locate runs both models on this machine"):
        api.compare(dense(*CHAIN), dense(*CHAIN), target="ssh:nowhere", locate=True)


def test_neither_model_is_changed(quantized: tuple[ir.Model, ir.Model, Feeds]) -> None:
    model, after, data = quantized
    before = [ir.to_proto(m).SerializeToString() for m in (model, after)]
    locate(model, after, data.first(1))
    assert [ir.to_proto(m).SerializeToString() for m in (model, after)] == before


def test_unrounded_goes_back_over_the_pair(quantized: tuple[ir.Model, ir.Model, Feeds]) -> None:
    _, after, _ = quantized
    nodes = [n for n in after.graph if n.op_type == "DequantizeLinear"]
    inner = [n for n in nodes if n.inputs[0] is not None and n.inputs[0].producer() is not None]
    assert inner
    for node in inner:
        source = unrounded(node.outputs[0])
        assert source.producer() is None or source.producer().op_type not in (  # type: ignore[union-attr]
            "QuantizeLinear",
            "DequantizeLinear",
        )
