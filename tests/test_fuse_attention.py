"""Attention in the styles of every exporter, against ONNX Runtime before and after."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from effdl.graph import io
from effdl.passes.fuse.attention import FuseAttention
from effdl.runtime.session import open_session
from tests.attention_graphs import CHANNELS, HEADS, SIZE, WIDE, Graph, Style, build, feed
from tests.support import from_text, op_counts, run_pass

Name = Literal["attention", "mha", "onnx"]
ONE_INPUT = ("separate", "plain", "gemm", "split", "slice", "gather")
NODES: dict[str, str] = {
    "attention": "Attention",
    "mha": "MultiHeadAttention",
    "onnx": "Attention",
}


def same(before: ir.Model, after: ir.Model, *, dead: bool = True) -> None:
    """Both compute the same at several sizes, also where all keys of a query are masked."""
    old, new = open_session(before), open_session(after)
    for seed, (b, s, t) in enumerate([(2, 5, 3), (1, 1, 4), (3, 2, 2), (2, 40, 1)]):
        sizes = {"B": b, "S": s, "T": t}
        given_ = feed(before, sizes, dead=dead and seed != 2, seed=seed)
        for want, got in zip(old.run(given_).values(), new.run(given_).values(), strict=True):
            assert want.shape == got.shape
            np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


def fused(model: ir.Model, form: Name = "mha", count: int = 1, *, dead: bool = True) -> ir.Model:
    """The model after the pass, which must find ``count`` attentions and compute the same."""
    after = model.clone()
    changes, log = run_pass(FuseAttention(form=form), after)
    assert (changes, len(log.touched)) == (count, count), log.skipped
    declared = [(v.name, v.type, v.shape) for v in (*model.graph.inputs, *model.graph.outputs)]
    kept = [(v.name, v.type, v.shape) for v in (*after.graph.inputs, *after.graph.outputs)]
    assert kept == declared
    same(model, after, dead=dead)
    once = io.to_bytes(after)
    assert run_pass(FuseAttention(form=form), after)[0] == 0
    assert io.to_bytes(after) == once
    return after


def declined(model: ir.Model, reason: str, form: Name = "mha") -> None:
    """The pass leaves every byte and says why, with the name of the node."""
    before = io.to_bytes(model)
    changes, log = run_pass(FuseAttention(form=form), model)
    assert changes == 0
    assert io.to_bytes(model) == before
    assert any(reason in why and name for name, why in log.skipped), log.skipped


def check(style: Style, form: Name) -> dict[str, int]:
    counts = op_counts(fused(build(style), form))
    packs = form == "attention" and style.source in ONE_INPUT and style.value_size == SIZE
    kind = "MultiHeadAttention" if form == "attention" and not packs else NODES[form]
    assert counts[kind] == 1, counts
    assert "Softmax" not in counts
    return counts


MASKS = (
    "none",
    "b11t",
    "b1st",
    "bhst",
    "1hst",
    "hst",
    "st",
    "t",
    "number",
    "b1s1",
    "two",
    "scaled",
)
CHOSEN = ("where_inf", "where_low", "where_swapped", "where_where", "where_scaled")
MIXED = (
    "where_over_add",
    "where_under_add",
    "integers",
    "low",
    "inf",
    "low_and_low",
    "inf_and_bias",
)
BY_HEAD = ("bhst", "1hst", "hst", "where_over_add", "where_under_add", "inf_and_bias")
SOURCES = (*ONE_INPUT, "interleaved", "cross")


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.builds(
        Style,
        source=st.sampled_from(SOURCES),
        keys=st.sampled_from(["once", "twice", "flat"]),
        scale=st.sampled_from(["none", "scores", "divided", "q", "k", "both"]),
        mask=st.sampled_from([*MASKS, *CHOSEN, *MIXED]),
        flat=st.sampled_from(["", "", "view"]),
        merged=st.sampled_from(["3d", "2d"]),
        batch=st.sampled_from(["B", 1]),
        queries=st.sampled_from(["S", 6]),
        opset=st.sampled_from([11, 13, 17, 18, 23]),
    ),
    st.sampled_from(["attention", "mha"]),
)
def test_every_mixture_is_fused(style: Style, form: Name) -> None:
    check(style, form)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("form", ["attention", "mha", "onnx"])
def test_every_source(source: str, form: Name) -> None:
    counts = check(Style(source, opset=23, mask="integers"), form)
    assert "Transpose" not in counts or source == "interleaved"


@pytest.mark.parametrize("mask", [*MASKS, *CHOSEN, *MIXED])
def test_every_mask(mask: str) -> None:
    check(Style(mask=mask), "mha")


@pytest.mark.parametrize("mask", [m for m in MASKS if m not in ("none", "two")])
def test_masks_of_unknown_numbers_do_not_fit_the_standard_operator(mask: str) -> None:
    declined(build(Style(mask=mask, opset=23)), "in the standard operator they give 0", "onnx")


@pytest.mark.parametrize("mask", ["none", "integers"])
def test_the_standard_operator(mask: str) -> None:
    counts = check(Style(mask=mask, opset=23, value_size=2), "onnx")
    assert counts.get("Add", 0) == 4
    declined(build(Style(mask=mask, opset=22)), "opset 23", "onnx")


@pytest.mark.parametrize("form", ["attention", "mha", "onnx"])
@pytest.mark.parametrize("mask", ["where_inf", "inf", "where_scaled"])
def test_the_guard_against_nan_stays(mask: str, form: Name) -> None:
    style = Style(mask=mask, guard=True, opset=23)
    counts = op_counts(fused(build(style), form))
    assert "IsNaN" not in counts
    if form == "onnx":
        declined(build(replace(style, guard=False)), "give something", "onnx")


@pytest.mark.parametrize("form", ["attention", "mha"])
@pytest.mark.parametrize("mask", [m for m in (*MASKS[1:], *CHOSEN, *MIXED) if m not in BY_HEAD])
def test_the_guard_with_every_mask(mask: str, form: Name) -> None:
    counts = op_counts(fused(build(Style(mask=mask, guard=True)), form))
    low = mask in ("where_low", "where_swapped", "low", "integers")
    assert ("IsInf" in counts) != low, counts


@pytest.mark.parametrize("form", ["attention", "mha"])
@pytest.mark.parametrize("mask", BY_HEAD)
def test_rows_masked_by_head_are_left_alone(mask: str, form: Name) -> None:
    declined(build(Style(mask=mask, guard=True)), "for each head in its own way", form)


@pytest.mark.parametrize(
    ("style", "reason"),
    [
        (Style(mask="where_mild"), "masks with -10000"),
        (Style(merged="never"), "is used before its heads are put side by side"),
        (Style(flat="bmm", merged="never"), "is used before its heads are put side by side"),
        (Style(extra="scores"), "is also a graph output"),
        (Style(extra="weights"), "are a graph output"),
        (Style(dtype=TensorProto.FLOAT16), "float32 only"),
        (Style(dtype=TensorProto.DOUBLE), "float32 only"),
    ],
)
def test_what_is_left_alone(style: Style, reason: str) -> None:
    for form in ("attention", "mha"):
        declined(build(style), reason, form)


@pytest.mark.parametrize("form", ["attention", "mha"])
@pytest.mark.parametrize("flat", ["", "bmm", "view"])
@pytest.mark.parametrize("value_size", [SIZE, 2])
def test_outputs_of_the_graph(form: Name, flat: str, value_size: int) -> None:
    for extra in ("present", "final"):
        style = Style(extra=extra, flat=flat, value_size=value_size)
        counts = op_counts(fused(build(style), form))
        packs = form == "attention" and value_size == SIZE and extra == "final"
        assert counts["Attention" if packs else "MultiHeadAttention"] == 1
        assert counts["MatMul"] == (1 if packs else 4)  # none is computed twice


@pytest.mark.parametrize("form", ["attention", "mha", "onnx"])
def test_one_head_of_keys_for_several_of_queries(form: Name) -> None:
    counts = op_counts(fused(build(Style("grouped", opset=23)), form))
    assert ("Expand" in counts) == (form != "onnx")


def test_auto_takes_what_fits() -> None:
    model = build(Style("cross", mask="b11t"))
    assert run_pass(FuseAttention(), model)[0] == 1
    assert model.opset_imports["com.microsoft"] == 1
    assert [v.form for v in FuseAttention().variants()] == ["attention", "mha", "onnx"]
    assert len(FuseAttention(form="mha").variants()) == 1
    model = build(Style())
    assert run_pass(FuseAttention(ignore=("Softmax",)), model)[0] == 0


def plain(
    g: Graph,
    q: str,
    k: str,
    v: str,
    *,
    scale: float = 0.5,
    axis: int | None = -1,
    times: float = 1.0,
) -> None:
    """Finish a block from [B, H, S, D]."""
    scores = g.op("Mul", g.op("MatMul", q, g.op("Transpose", k, perm=(0, 1, 3, 2))), g.const(scale))
    scores = g.op("Mul", scores, g.const(times)) if times != 1 else scores
    weights = g.op("Softmax", scores, **({} if axis is None else {"axis": axis}))
    context = g.op("Transpose", g.op("MatMul", weights, v), perm=(0, 2, 1, 3))
    g.output(g.layer(g.reshape(context, 0, 0, WIDE), CHANNELS, channels=WIDE), 3)


def heads(g: Graph, a: str) -> str:
    return str(g.op("Transpose", g.reshape(a, 0, 0, HEADS, SIZE), perm=(0, 2, 1, 3)))


def three(g: Graph) -> list[str]:
    x = g.input("x", ["B", "S", CHANNELS])
    return [heads(g, g.layer(x, WIDE)) for _ in range(3)]


def test_a_factor_of_the_values_stays() -> None:
    for form in ("attention", "mha"):
        g = Graph(17)
        q, k, v = three(g)
        plain(g, q, k, g.op("Mul", v, g.const(3.0)))
        assert op_counts(fused(g.model(), form))["Mul"] == 1


def test_scales_that_are_not_positive() -> None:
    for scale, times in ((-0.5, 1.0), (0.0, 1.0), (-0.5, -1.0)):
        g = Graph(17)
        plain(g, *three(g), scale=scale, times=times)
        declined(g.model(), "turns the scores round")
    g = Graph(17)
    q, k, v = three(g)
    plain(g, g.op("Mul", q, g.const(0.0)), k, v)
    declined(g.model(), "the scale of Softmax")


def test_softmax_without_an_axis() -> None:
    for version, count in ((11, 0), (13, 1)):
        g = Graph(version)
        plain(g, *three(g), axis=None)
        if count:
            fused(g.model())
        else:
            declined(g.model(), "is not over the last axis")
    g = Graph(11)
    plain(g, *three(g), axis=3)
    fused(g.model())


def test_the_first_of_a_dynamic_length() -> None:
    """The first 40 queries are all of them at small sizes only."""
    for ends, count in (((40,), 1), ((2**63 - 1,), 1), ((2**31 - 1,), 1)):
        g = Graph(17)
        x = g.input("x", ["B", "S", CHANNELS])
        q = g.op("Slice", g.layer(x, WIDE), g.ints(0), g.ints(*ends), g.ints(1))
        plain(g, heads(g, q), *(heads(g, g.layer(x, WIDE)) for _ in range(2)))
        model = g.model()
        after = model.clone()
        assert run_pass(FuseAttention(form="attention"), after)[0] == count
        assert ("Slice" in op_counts(after)) == (ends[0] == 40)
        given_ = feed(model, {"B": 2, "S": 50}, dead=False)
        for want, got in zip(
            open_session(model).run(given_).values(),
            open_session(after).run(given_).values(),
            strict=True,
        ):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_an_index_that_no_probe_has() -> None:
    g = Graph(17)
    x = g.input("x", ["B", "S", CHANNELS])
    q = g.op("Gather", g.layer(x, WIDE), g.const([45], np.int64), axis=1)
    plain(g, heads(g, q), *(heads(g, g.layer(x, WIDE)) for _ in range(2)))
    after = g.model().clone()
    assert run_pass(FuseAttention(form="attention"), after)[0] == 1
    given_ = feed(g.model(), {"B": 2, "S": 50}, dead=False)
    want, got = (next(iter(open_session(m).run(given_).values())) for m in (g.model(), after))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_values_of_one_sample_for_all() -> None:
    g = Graph(17)
    x = g.input("x", [2, "S", CHANNELS])
    q, k, v = (heads(g, g.layer(x, WIDE)) for _ in range(3))
    v = g.op("Slice", v, g.ints(0), g.ints(1), g.ints(0))
    plain(g, q, k, v)
    declined(g.model(), "have different batches")


def test_queries_of_one_sample_for_all() -> None:
    g = Graph(17)
    x = g.input("x", ["B", "S", CHANNELS])
    k, v = (heads(g, g.layer(x, WIDE)) for _ in range(2))
    goal = g.op("Concat", g.dim(x, 0), g.ints(6, WIDE), axis=0)
    q = heads(g, g.op("Expand", g.random(1, 6, WIDE), goal))
    plain(g, q, k, v)
    fused(g.model())


def test_scores_seen_another_way_round() -> None:
    g = Graph(17)
    x = g.input("x", [2, 4, CHANNELS])
    other = g.input("other", [2, 4, CHANNELS])
    q, k, v = (heads(g, g.layer(a, WIDE)) for a in (x, other, other))
    scores = g.reshape(g.op("MatMul", q, g.op("Transpose", k, perm=(0, 1, 3, 2))), 2, HEADS, 2, 8)
    weights = g.reshape(g.op("Softmax", scores, axis=-1), 2, HEADS, 4, 4)
    context = g.op("Transpose", g.op("MatMul", weights, v), perm=(0, 2, 1, 3))
    g.output(g.op("Tanh", g.reshape(context, 0, 0, WIDE)), 3)
    declined(g.model(), "mixes queries and keys")


def test_weights_that_a_caller_may_feed() -> None:
    for form in ("attention", "mha"):
        g = Graph(17)
        plain(g, *three(g))
        model = g.model()
        for value in list(model.graph.initializers.values()):
            if value.shape == ir.Shape([CHANNELS, WIDE]):
                model.graph.inputs.append(value)
        after = model.clone()
        assert run_pass(FuseAttention(form=form), after)[0] == 1
        assert op_counts(after)["MultiHeadAttention"] == 1
        same_with = feed(build(Style()), {"B": 2, "S": 3}, dead=False)
        want, got = (next(iter(open_session(m).run(same_with).values())) for m in (model, after))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_one_layer_for_queries_and_keys() -> None:
    for form in ("attention", "mha"):
        g = Graph(17)
        x = g.input("x", ["B", "S", CHANNELS])
        both, v = (heads(g, g.layer(x, WIDE)) for _ in range(2))
        plain(g, both, both, v)
        fused(g.model(), form)


def test_a_product_for_each_head() -> None:
    """[B, H, S, C] times one matrix for all heads is no layer of [B, S, C]."""
    for form in ("attention", "mha"):
        g = Graph(17)
        x = g.input("x", ["B", HEADS, "S", CHANNELS])
        plain(g, *(g.layer(x, SIZE) for _ in range(3)))
        fused(g.model(), form)
        g = Graph(17)
        x = g.input("x", ["B", "S", HEADS, CHANNELS])
        turned = (g.op("Transpose", g.layer(x, SIZE), perm=(0, 2, 1, 3)) for _ in range(3))
        plain(g, *turned)
        fused(g.model(), form)


def test_two_layers_share_their_mask() -> None:
    for form in ("attention", "mha"):
        g = Graph(17)
        m = g.input("m", ["B", 1, 1, "S"], TensorProto.BOOL)
        a = g.input("x", ["B", "S", CHANNELS])
        for _ in range(2):
            q, k, v = (heads(g, g.layer(a, WIDE)) for _ in range(3))
            scores = g.op("MatMul", q, g.op("Transpose", k, perm=(0, 1, 3, 2)))
            masked = g.op("Where", m, scores, g.const(-np.inf))
            weights = g.op("Softmax", masked, axis=-1)
            weights = g.op("Where", g.op("IsNaN", weights), g.const(0.0), weights)
            context = g.op("Transpose", g.op("MatMul", weights, v), perm=(0, 2, 1, 3))
            a = g.layer(g.reshape(context, 0, 0, WIDE), CHANNELS, channels=WIDE)
        g.output(a, 3)
        counts = op_counts(fused(g.model(), form, 2))
        assert counts["Where"] == 3  # one mask, and the dead rows of each
        assert counts["IsInf"] == counts["Expand"] == 1


@pytest.mark.parametrize("one", [False, True])
def test_windows(one: bool) -> None:
    g = Graph(17)
    windows, n = 4, 6
    x = g.reshape(g.input("x", ["B", windows, n, CHANNELS]), -1, n, CHANNELS)
    q, k, v = (heads(g, g.layer(x, WIDE)) for _ in range(3))
    scores = g.op("MatMul", q, g.op("Transpose", k, perm=(0, 1, 3, 2)))
    scores = g.op("Add", scores, g.random(1, HEADS, n, n))
    mask = g.rng.choice([0.0, -100.0], (1, 1 if one else windows, 1, n, n))
    five = g.op("Add", g.reshape(scores, -1, windows, HEADS, n, n), g.const(mask))
    weights = g.op("Softmax", g.reshape(five, -1, HEADS, n, n), axis=-1)
    context = g.op("Transpose", g.op("MatMul", weights, v), perm=(0, 2, 1, 3))
    g.output(g.op("Tanh", g.reshape(context, 0, 0, WIDE)), 3)
    for form in ("attention", "mha"):
        fused(g.model(), form)


@pytest.mark.parametrize("kind", ["wide", "narrow", "one"])
def test_masks_in_three_axes(kind: str) -> None:
    for chosen in (False, True):
        g = Graph(17)
        x = g.input("x", ["B", "S", CHANNELS])
        q, k, v = (g.reshape(heads(g, g.layer(x, WIDE)), -1, g.dim(x, 1), SIZE) for _ in range(3))
        dtype = TensorProto.BOOL if chosen else TensorProto.FLOAT
        m = g.input("m", ["B", 1, 1 if kind == "narrow" else "S", "S"], dtype)
        if kind == "one":
            m = g.input("m2", [1, "S", "S"], dtype)
        else:
            goal = g.op("Concat", g.dim(x, 0), g.ints(HEADS, 1, 1), axis=0)
            wide = g.op("Expand", m, goal)
            m = g.reshape(wide, -1, g.dim(wide, 2), g.dim(x, 1))
        scores = g.op("MatMul", q, g.op("Transpose", k, perm=(0, 2, 1)))
        low = g.const(-np.inf)
        scores = g.op("Where", m, scores, low) if chosen else g.op("Add", m, scores)
        context = g.op("MatMul", g.op("Softmax", scores, axis=-1), v)
        four = g.reshape(context, g.dim(x, 0), HEADS, g.dim(x, 1), SIZE)
        final = g.reshape(g.op("Transpose", four, perm=(0, 2, 1, 3)), 0, 0, WIDE)
        g.output(g.op("Tanh", final), 3)
        fused(g.model())


def standard(
    rank: int = 3, mask: str = "", more: tuple[str, ...] = (), **attributes: float
) -> ir.Model:
    g = Graph(23)
    x = g.input("x", ["B", "S", CHANNELS])
    q, k, v = (g.layer(x, WIDE) for _ in range(3))
    if rank == 4:
        q, k, v = (heads(g, a) for a in (q, k, v))
    else:
        attributes = {"q_num_heads": HEADS, "kv_num_heads": HEADS, **attributes}
    shapes: dict[str, list[int | str]] = {"float": ["B", 1, "S", "S"], "bool": ["S", "S"]}
    masks = []
    if mask:
        dtype = TensorProto.BOOL if mask == "bool" else TensorProto.FLOAT
        masks = [g.input("m", shapes[mask], dtype)]
    y = g.op("Attention", q, k, v, *masks, *more, **attributes)
    if rank == 4:
        y = g.reshape(g.op("Transpose", y, perm=(0, 2, 1, 3)), 0, 0, WIDE)
    g.output(g.op("Tanh", y), 3)
    return g.model()


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("mask", ["", "float", "bool"])
@pytest.mark.parametrize("form", ["attention", "mha"])
def test_onnx_attention(rank: int, mask: str, form: Name) -> None:
    after = fused(standard(rank, mask, scale=0.3), form)
    assert all(n.domain == "com.microsoft" for n in after.graph if n.op_type == "Attention")
    counts = op_counts(fused(standard(rank, mask), form))
    assert "Transpose" not in counts
    declined(standard(rank, mask), "is the standard operator already", "onnx")


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"is_causal": 1}, "masks what comes later"),
        ({"softcap": 5.0}, "caps the scores"),
        ({"softmax_precision": 11}, "asks for another precision"),
    ],
)
def test_onnx_attention_that_does_more(attributes: dict[str, float], reason: str) -> None:
    declined(standard(**attributes), reason)


def test_onnx_attention_with_a_past() -> None:
    g = Graph(23)
    x = g.input("x", ["B", "S", CHANNELS])
    q, k, v = (heads(g, g.layer(x, WIDE)) for _ in range(3))
    past = [g.input(n, ["B", HEADS, "P", SIZE]) for n in ("pk", "pv")]
    y = g.op("Attention", q, k, v, "", *past, outputs=3)
    for name in y:
        g.output(name, 4)
    declined(g.model(), "takes past keys")


def test_onnx_attention_with_fewer_heads_of_keys() -> None:
    g = Graph(23)
    x = g.input("x", ["B", "S", CHANNELS])
    q, k, v = g.layer(x, WIDE), g.layer(x, SIZE), g.layer(x, SIZE)
    g.output(g.op("Attention", q, k, v, q_num_heads=HEADS, kv_num_heads=1), 3)
    declined(g.model(), "has 1 heads where 3 are needed")


def test_bodies_and_functions_are_left_alone() -> None:
    inner = """q = MatMul(x, kt) w = Softmax<axis = -1>(q) c = MatMul(w, x) y = Identity(c)"""
    head = '<ir_version: 8, opset_import: ["": 17, "own": 1]>'
    body = f"""{head} g (float[2,3,4] x, bool b) => (float[2,3,4] z) {{
        kt = Transpose<perm = [0, 2, 1]>(x)
        z = If(b)<then_branch = t () => (float[2,3,4] y) {{ {inner} }},
                  else_branch = e () => (float[2,3,4] o) {{ o = Neg(x) }}> }}"""
    called = f"""{head} g (float[2,3,4] x) => (float[2,3,4] z) {{ z = own.att(x) }}
        <domain: "own", opset_import: ["": 17]> att (x) => (y) {{
            kt = Transpose<perm = [0, 2, 1]>(x) {inner} }}"""
    declined(from_text(body), "inside the body")
    declined(from_text(called), "inside a function")


def test_one_query_and_one_key() -> None:
    """With S = T = 1 heads and queries lie the same way; which is which is told by their number."""
    for form in ("attention", "mha"):
        for source in ("separate", "gather", "interleaved"):
            fused(build(Style(source, queries=1, batch=2, mask="t")), form)
