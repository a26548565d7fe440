"""Attention in the styles of every exporter, against ONNX Runtime before and after."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from effdl.passes.fuse.attention import FuseAttention
from tests.attention_graphs import SIZE, Style, build
from tests.attention_lab import Name, declined, fused
from tests.support import op_counts, run_pass

ONE_INPUT = ("separate", "plain", "gemm", "split", "slice", "gather")
NODES: dict[str, str] = {
    "attention": "Attention",
    "mha": "MultiHeadAttention",
    "onnx": "Attention",
}
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


def check(style: Style, form: Name) -> dict[str, int]:
    counts = op_counts(fused(build(style), form))
    packs = form == "attention" and style.source in ONE_INPUT and style.value_size == SIZE
    kind = "MultiHeadAttention" if form == "attention" and not packs else NODES[form]
    assert counts[kind] == 1, counts
    assert "Softmax" not in counts
    return counts


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
