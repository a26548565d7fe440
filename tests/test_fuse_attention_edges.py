"""Attention that is nearly the known one, and ONNX's own operator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from effdl.graph import io
from effdl.passes.fuse.attention import FuseAttention
from effdl.runtime.session import open_session
from tests.attention_graphs import CHANNELS, HEADS, LOW, SIZE, WIDE, Graph, Style, build, feed
from tests.attention_lab import Name, declined, fused, heads, plain, three
from tests.support import from_text, op_counts, run_pass


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


def test_shapes_that_a_caller_may_feed() -> None:
    g = Graph(17)
    plain(g, *three(g))
    model = g.model()
    goals = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.INT64]
    model.graph.inputs.extend(goals)
    declined(model, f"a caller may feed '{goals[0].name}'")
    g = Graph(17)
    plain(g, *three(g))
    model = g.model()
    model.graph.inputs.extend(v for v in model.graph.initializers.values() if not v.shape)
    declined(model, "no product of queries and keys")


def test_lengths_read_from_the_context() -> None:
    for form in ("attention", "mha"):
        g = Graph(17)
        q, k, v = three(g)
        scores = g.op("MatMul", q, g.op("Transpose", k, perm=(0, 1, 3, 2)))
        context = g.op("MatMul", g.op("Softmax", scores, axis=-1), v)
        batch, length = (g.op("Shape", context, start=a, end=a + 1) for a in (0, 2))
        turned = g.op("Transpose", context, perm=(0, 2, 1, 3))
        final = g.reshape(turned, batch, length, WIDE)
        flat = g.layer(g.reshape(final, -1, WIDE), CHANNELS, channels=WIDE)
        g.output(g.reshape(flat, batch, length, CHANNELS), 3)
        counts = op_counts(fused(g.model(), form))
        assert counts["Shape"] == 2
        assert "Softmax" not in counts


@pytest.mark.parametrize("form", ["attention", "mha"])
def test_rows_as_low_as_the_kernel_of_onnx_masks(form: Name) -> None:
    model = standard(3, "float")
    after = model.clone()
    assert run_pass(FuseAttention(form=form), after)[0] == 1
    given_ = feed(model, {"B": 1, "S": 6}, dead=False)
    given_["m"][0, 0, 1:, :] = LOW
    given_["m"][0, 0, 2, 1:4] = -np.inf
    given_["m"][0, 0, 3] = -np.inf
    given_["m"][0, 0, 4, 2] = 1.0
    given_["m"][0, 0, 5, 3:] = -3e38
    (want,), (got,) = (open_session(m).run(given_).values() for m in (model, after))
    assert not np.any(want[0, 1:4])
    assert np.all(want[0, 4:])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_layers_without_a_product_in_between() -> None:
    for form in ("attention", "mha"):
        g = Graph(17)
        a = g.input("x", ["B", "S", WIDE])
        for _ in range(3):
            q, k, v = (heads(g, g.layer(a, WIDE, channels=WIDE)) for _ in range(3))
            weights = g.op("Softmax", g.op("MatMul", q, g.op("Transpose", k, perm=(0, 1, 3, 2))))
            context = g.op("Transpose", g.op("MatMul", weights, v), perm=(0, 2, 1, 3))
            a = g.reshape(context, 0, 0, WIDE)
        g.output(a, 3)
        counts = op_counts(fused(g.model(), form, 3))
        assert counts["Attention" if form == "attention" else "MultiHeadAttention"] == 3


def test_keys_and_values_of_two_attentions() -> None:
    for form in ("attention", "mha"):
        g = Graph(17)
        x = g.input("x", ["B", "S", CHANNELS])
        k, v = (heads(g, g.layer(x, WIDE)) for _ in range(2))
        for _ in range(2):
            plain(g, heads(g, g.layer(x, WIDE)), k, v)
        counts = op_counts(fused(g.model(), form, 2))
        assert counts["MultiHeadAttention"] == 2
        assert counts["MatMul"] == 6


def test_weights_beside_the_model(tmp_path: Path) -> None:
    for form in ("attention", "mha"):
        proto = onnx.load_model_from_string(io.to_bytes(build(Style(mask="b11t"))))
        file = tmp_path / f"{form}.onnx"
        onnx.save_model(
            proto, file, save_as_external_data=True, location=f"{form}.data", size_threshold=200
        )
        fused(io.load(file), form)


def test_ids_and_masks_with_dimensions_of_their_own() -> None:
    for form in ("attention", "mha"):
        g = Graph(17)
        ids = g.input("ids", ["a", "b"], TensorProto.INT64)
        m = g.input("m", ["c", "d"], TensorProto.INT64)
        x = g.op("Gather", g.random(4, CHANNELS), ids)
        q, k, v = (heads(g, g.layer(x, WIDE)) for _ in range(3))
        mask = g.axes("Unsqueeze", g.op("Cast", m, to=TensorProto.FLOAT), 1, 2)
        low = g.op("Mul", g.op("Sub", g.const(1.0), mask), g.const(LOW))
        scores = g.op("Add", g.op("MatMul", q, g.op("Transpose", k, perm=(0, 1, 3, 2))), low)
        context = g.op("MatMul", g.op("Softmax", scores), v)
        g.output(g.reshape(g.op("Transpose", context, perm=(0, 2, 1, 3)), 0, 0, WIDE), 3)
        model = g.model()
        after = model.clone()
        assert run_pass(FuseAttention(form=form), after)[0] == 1
        for b, s, masks in ((2, 5, (2, 5)), (3, 4, (1, 4)), (2, 3, (2, 1)), (1, 1, (1, 1))):
            given_ = {
                "ids": g.rng.integers(0, 4, (b, s)),
                "m": g.rng.integers(0, 2, masks),
            }
            (want,), (got,) = (open_session(n).run(given_).values() for n in (model, after))
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
