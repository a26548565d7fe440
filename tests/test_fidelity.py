from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from effdl.data.feeds import Feeds
from effdl.errors import DataError, ModelError, UsageError
from effdl.graph import io
from effdl.measure import fidelity, fidelity_sums
from effdl.measure.fidelity import compare, same
from effdl.measure.fidelity_outputs import Comparison, compare_outputs
from effdl.report import OutputError
from tests.support import SAMPLES, from_text

F = np.float32


def one(a: Any, b: Any, **options: Any) -> OutputError:
    (error,) = compare_outputs([{"y": a}], [{"y": b}], **options)
    return error


def arr(*values: float, dtype: Any = F) -> np.ndarray:
    return np.array(values, dtype)


def model(body: str, dtype: str = "float", out: str | None = None) -> ir.Model:
    return from_text(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g ({dtype}[N,4] x) => ({out or dtype}[N,4] y) {{ {body} }}"""
    )


def feeds(count: int = 3, dtype: Any = F, name: str = "x") -> Feeds:
    rng = np.random.default_rng(0)
    return Feeds(
        tuple({name: rng.standard_normal((2, 4)).astype(dtype)} for _ in range(count)),
        "random",
        False,
    )


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        F, st.tuples(st.integers(1, 4), st.integers(2, 6)), elements=st.floats(-9, 9, width=32)
    ),
    st.integers(0, 2**31),
)
def test_figures_are_those_of_the_textbook(a: np.ndarray, seed: int) -> None:
    b = (a + np.random.default_rng(seed).normal(0, 0.1, a.shape)).astype(F)
    error = one(a, b)
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    d = np.abs(x - y)
    assert error.max_abs == pytest.approx(d.max())
    assert error.mean_abs == pytest.approx(d.mean())
    norm = float(np.linalg.norm(x))
    if norm > 1e-3:
        assert error.rel_l2 == pytest.approx(np.linalg.norm(d) / norm)
        assert error.cosine == pytest.approx(x @ y / norm / np.linalg.norm(y), abs=1e-9)
        assert error.sqnr_db == pytest.approx(10 * np.log10((x @ x) / (d @ d)))
    assert error.top1 == pytest.approx(np.mean(a.argmax(-1) == b.argmax(-1)))
    allowed = 1e-4 * np.maximum(np.abs(x), math.sqrt(np.mean(x**2)))
    assert error.equal == bool((d <= allowed).all())


def test_several_runs_are_summed_like_one_long_output() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 5, 7)).astype(F)
    whole = one(a, b)
    parts = compare_outputs([{"y": row[None]} for row in a], [{"y": row[None]} for row in b])[0]
    for field in ("max_abs", "mean_abs", "rel_l2", "cosine", "sqnr_db", "top1"):
        assert getattr(parts, field) == pytest.approx(getattr(whole, field))


def test_large_arrays_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    a = rng.standard_normal((10, 10)).astype(F)
    b = a.copy()
    b[9, 9] += 1
    whole = one(a, b)
    monkeypatch.setattr(fidelity_sums, "CHUNK", 7)
    parts = one(a, b)
    assert not parts.equal
    assert parts.rel_l2 == pytest.approx(whole.rel_l2)
    assert parts.max_abs == pytest.approx(whole.max_abs)
    assert one(a, a.copy()).equal


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(np.float64, 1e-7), (F, 1e-4), (np.float16, 1e-2), (ml_dtypes.bfloat16, 3e-2)],
)
def test_tolerance_goes_with_the_dtype(dtype: Any, rtol: float) -> None:
    a = np.full(1000, 1.0, dtype)
    inside, outside = a.copy(), a.copy()
    inside[0], outside[0] = 1 + 0.7 * rtol, 1 + 1.5 * rtol
    assert one(a, inside).equal
    assert not one(a, outside).equal
    assert one(a, a).tolerance == rtol


def test_values_near_zero_are_held_to_the_size_of_the_output() -> None:
    big = np.full(99, 10.0, F)
    assert one(np.append(big, F(0)), np.append(big, F(5e-4))).equal
    assert not one(np.append(big, F(0)), np.append(big, F(5e-3))).equal
    # One large value does not excuse the others.
    spike = np.append(np.full(9999, 1e-3, F), F(1000))
    moved = spike.copy()
    moved[0] = 0.01
    assert not one(spike, moved).equal


def test_zero_outputs_have_figures() -> None:
    zero, some = np.zeros((2, 3), F), np.full((2, 3), 0.5, F)
    both = one(zero, zero)
    assert (both.equal, both.rel_l2, both.cosine, both.sqnr_db) == (True, 0.0, 1.0, math.inf)
    appears = one(zero, some)
    assert (appears.equal, appears.rel_l2, appears.cosine) == (False, math.inf, 0.0)
    assert appears.sqnr_db == -math.inf
    vanishes = one(some, zero)
    assert (vanishes.equal, vanishes.rel_l2, vanishes.cosine) == (False, 1.0, 0.0)
    assert vanishes.sqnr_db == pytest.approx(0.0)
    assert one(arr(1e-40, 1e-41), arr(0, 0)).equal  # subnormal numbers, flushed


def test_nan_and_infinity_must_be_at_the_same_places() -> None:
    a = arr(1, np.nan, np.inf, -np.inf)
    good = one(a, a.copy())
    assert good.equal
    assert good.rel_l2 == 0
    assert good.cosine == pytest.approx(1.0)
    for b, says in [
        (arr(np.nan, np.nan, np.inf, -np.inf), "it is NaN where the reference is not"),
        (arr(1, 2, np.inf, -np.inf), "it is not NaN where the reference is"),
        (arr(np.inf, np.nan, np.inf, -np.inf), "it is infinite where the reference is not"),
        (arr(1, np.nan, 3, -np.inf), "it is not infinite where the reference is"),
        (arr(1, np.nan, np.inf, np.inf), "it is infinite with the other sign"),
    ]:
        bad = one(a, b)
        assert not bad.equal
        assert says in bad.reason
        assert bad.rel_l2 == math.inf


def test_shape_and_dtype_changes_are_reasons() -> None:
    a = np.ones((2, 3), F)
    assert one(a, np.ones((3, 2), F)).reason == "its shape is [3, 2], was [2, 3]"
    assert one(a, a.astype(np.float16)).reason == "its dtype is float16, was float32"
    assert one(a, a.astype(np.int64), casts=True).reason == "its dtype is int64, was float32"
    assert one(a, np.array([["a"] * 3] * 2)).reason == "its dtype is string, was float32"
    assert not one(a, a.astype(np.float16)).equal
    cast = one(a, (a + F(0.004)).astype(np.float16), casts=True)
    assert cast.equal
    assert cast.tolerance == 1e-2


def test_integers_booleans_and_texts_are_exact() -> None:
    big = np.array([2**62, 5], np.int64)
    assert one(big, big.copy()).equal
    assert not one(big, big + np.array([1, 0])).equal  # a float64 cannot tell these apart
    off = one(arr(1, 2, dtype=np.uint8), arr(1, 3, dtype=np.uint8))
    assert (off.equal, off.max_abs, off.mean_abs, off.reason) == (False, 1.0, 0.5, "")
    assert not one(np.array([True, False]), np.array([True, True])).equal
    texts = np.array(["a", "b"], object)
    assert one(texts, texts.copy()).equal
    other = one(texts, np.array(["a", "c"], object))
    assert (other.equal, other.mean_abs, other.reason) == (False, 0.5, "")
    assert other.rel_l2 == pytest.approx(math.sqrt(0.5))


def test_top1_only_where_it_says_something() -> None:
    assert one(np.ones(5, F), np.ones(5, F)).top1 is None
    assert one(np.ones((5, 1), F), np.ones((5, 1), F)).top1 is None
    assert one(np.ones((5, 2), np.int64), np.ones((5, 2), np.int64)).top1 is None
    a = np.eye(4, dtype=F)
    b = a[[0, 1, 3, 2]]
    assert one(a, b).top1 == 0.5
    half = ml_dtypes.bfloat16
    assert one(a.astype(half), b.astype(half)).top1 == 0.5


def softmax(a: np.ndarray, axis: int = -1) -> np.ndarray:
    e = np.exp(a - a.max(axis, keepdims=True))
    return np.asarray(e / e.sum(axis, keepdims=True))


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) row by row and class by class."""
    rows = []
    for a, b in zip(p, q, strict=True):
        rows.append(
            sum(float(x) * math.log(float(x) / float(y)) for x, y in zip(a, b, strict=True))
        )
    return float(np.mean(rows))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(2, 7), st.floats(0.1, 8), st.integers(0, 2**31))
def test_kl_is_that_of_the_definition(rows: int, classes: int, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.normal(0, spread, (rows, classes))
    b = a + rng.normal(0, 0.3, a.shape)
    want = divergence(softmax(a), softmax(b))
    assert one(a, b).kl == pytest.approx(want, rel=1e-9, abs=1e-15)
    assert one(softmax(a), softmax(b)).kl == pytest.approx(want, rel=1e-9, abs=1e-15)
    logs = np.log(softmax(a)), np.log(softmax(b))
    assert one(*logs).kl == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_kl_of_softmax_outputs_and_of_half_precision() -> None:
    rng = np.random.default_rng(0)
    p, q = (softmax(rng.standard_normal((9, 5))) for _ in range(2))
    want = divergence(p, q)
    assert one(p.astype(F), q.astype(F)).kl == pytest.approx(want, rel=1e-5)
    half = one(p.astype(F), q.astype(np.float16), casts=True)
    assert half.kl == pytest.approx(want, rel=1e-2)
    assert one(p, p.copy()).kl == 0.0
    # A quantized softmax need not sum to one.
    assert one(p, q * 1.003).kl == pytest.approx(want)


def test_kl_on_impossible_classes_is_large_but_finite() -> None:
    sure, other = arr(1, 0).reshape(1, 2), arr(0, 1).reshape(1, 2)
    assert one(sure, other).kl == pytest.approx(-math.log(np.finfo(F).tiny), rel=1e-6)
    masked = arr(0, -np.inf).reshape(1, 2)
    assert one(np.vstack([masked, sure]), np.vstack([masked, sure])).kl == 0.0


def test_kl_and_top1_take_the_channels_of_an_image() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((2, 2, 3, 4, 5))  # [N, C, H, W]
    error = one(a, b)
    assert error.top1 == pytest.approx(np.mean(a.argmax(1) == b.argmax(1)))
    flat_a, flat_b = (softmax(v, 1).transpose(0, 2, 3, 1).reshape(-1, 3) for v in (a, b))
    assert error.kl == pytest.approx(divergence(flat_a, flat_b))
    last = one(a.transpose(0, 2, 3, 1), b.transpose(0, 2, 3, 1))  # [N, H, W, C]
    assert (last.top1, last.kl) == (pytest.approx(error.top1), pytest.approx(error.kl))
    assert one(a[:, :1], b[:, :1]).kl is None  # one channel: a mask, no classes


def test_kl_only_where_it_says_something(monkeypatch: pytest.MonkeyPatch) -> None:
    assert one(np.ones(5, F), np.ones(5, F)).kl is None
    assert one(np.ones((5, 1), F), np.ones((5, 1), F)).kl is None
    assert one(np.ones((5, 2), np.int64), np.ones((5, 2), np.int64)).kl is None
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 11, 4))
    whole = one(a, b)
    runs = compare_outputs([{"y": r[None]} for r in a], [{"y": r[None]} for r in b])[0]
    assert runs.kl == pytest.approx(whole.kl)
    monkeypatch.setattr(fidelity_sums, "CHUNK", 7)
    parts = one(a, b)
    assert (parts.kl, parts.top1) == (pytest.approx(whole.kl), pytest.approx(whole.top1))


def test_sequences_and_maps_are_compared_by_element() -> None:
    a = [{0: 0.25, 1: 0.75}, {0: 0.5, 1: 0.5}]
    assert one(a, [dict(reversed(m.items())) for m in a]).equal
    assert not one(a, [{0: 0.26, 1: 0.74}, a[1]]).equal
    assert one(a, [*a, a[0]]).reason == "its structure is a sequence of 3, was a sequence of 2"
    assert "structure" in one(a, [{0: 0.25, 2: 0.75}, a[1]]).reason
    tensors = [np.ones(2, F), np.ones((3, 3), F)]
    assert one(tensors, list(tensors)).equal
    assert "shape" in one(tensors, tensors[::-1]).reason
    assert one(None, None).equal
    assert one(tensors[0], None).reason == "its structure is empty, was a tensor"


def test_outputs_that_are_missing_or_new() -> None:
    y = np.ones(2, F)
    errors = compare_outputs([{"a": y, "b": y}], [{"b": y, "c": y}])
    assert [(e.name, e.equal) for e in errors] == [("a", False), ("b", True), ("c", False)]
    assert errors[0].reason == "the candidate has no such output"
    assert errors[2].reason == "the reference has no such output"


def test_own_tolerances() -> None:
    a, b = arr(1, 1), arr(1, 1.005)
    assert not one(a, b).equal
    assert one(a, b, rtol=0.01).equal
    assert one(a, b, rtol={"y": 0.01}).tolerance == 0.01
    whole, off = arr(100, dtype=np.int8), arr(101, dtype=np.int8)
    assert not one(whole, off, rtol=0.1).equal
    assert one(whole, off, rtol={"y": 0.1}).equal
    with pytest.raises(UsageError, match="no output 'yy'") as e:
        one(a, b, rtol={"yy": 0.01})
    assert e.value.hint == "did you mean 'y'?"


def test_comparison_keeps_sums_only() -> None:
    comparison = Comparison()
    comparison.add({"y": np.ones(100_000, F)}, {"y": np.ones(100_000, F)})
    held = [v for sums in comparison._sums.values() for v in vars(sums).values()]
    assert not any(isinstance(v, np.ndarray) for v in held)


def test_compare_models() -> None:
    report = compare(model("y = Exp(x)"), model("y = Exp(x)"), feeds())
    assert report.equal
    assert (report.feeds, report.source, report.real, report.notes) == (3, "random", False, ())
    other = compare(model("y = Exp(x)"), model("z = Exp(x) y = Neg(z)"), feeds())
    assert not other.equal
    assert other.outputs[0].cosine == pytest.approx(-1.0)


def test_compare_files_names_them() -> None:
    path = SAMPLES / "digits_cnn.onnx"
    image = np.random.default_rng(0).random((2, 1, 8, 8)).astype(F)
    report = compare(path, io.load(path), Feeds(({"image": image},), "random", False))
    assert report.equal
    assert (report.reference, report.candidate) == (str(path), "")
    assert report.outputs[0].top1 == 1.0


def test_half_precision_interface_is_cast_and_noted() -> None:
    report = compare(model("y = Exp(x)"), model("y = Exp(x)", "float16"), feeds())
    assert report.equal
    assert 0 < report.outputs[0].rel_l2 < 1e-2
    assert report.notes == (
        "input 'x' cast from float32 to float16",
        "output 'y' is float16, was float32: compared by value",
    )


def test_compare_refuses_what_does_not_fit(tmp_path: Path) -> None:
    a = model("y = Exp(x)")
    other_input = from_text(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N,4] z) => (float[N,4] y) { y = Exp(z) }"""
    )
    two_inputs = from_text(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N,4] x, float[N,4] z) => (float[N,4] y) { y = Add(x, z) }"""
    )
    with pytest.raises(ModelError, match="no input 'x'"):
        compare(a, other_input, feeds())
    with pytest.raises(ModelError, match="input 'z'"):
        compare(a, two_inputs, feeds())
    with pytest.raises(DataError):
        compare(a, a, Feeds((), "empty.npz", True))
    with pytest.raises(UsageError, match="no output 'Y'"):
        compare(a, a, feeds(), rtol={"Y": 1.0})
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\0\1\2\3")
    with pytest.raises(ModelError) as e:
        compare(a, broken, feeds())
    assert e.value.where == str(broken)


def test_same_when_equal_and_when_not() -> None:
    a = model("y = Exp(x)")
    equal, report = same(a, model("y = Exp(x)"), feeds())
    assert equal
    assert report.notes == ()
    off = model("c = Constant<value_float=1.01>() z = Exp(x) y = Mul(z, c)")
    equal, report = same(a, off, feeds())
    assert not equal
    assert not report.outputs[0].equal
    equal, report = same(a, model("y = Exp(x)", "float16"), feeds())
    assert not equal
    assert "float16" in report.notes[-1]


def test_same_forgives_fusions_of_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    original = fidelity.compare

    def fused(a: Any, b: Any, f: Feeds, *, optimize: bool = True, **options: Any) -> Any:
        off = "c = Constant<value_float=1.002>() z = Exp(x) y = Mul(z, c)"
        return original(a, model(off) if optimize else b, f, optimize=optimize, **options)

    a = model("y = Exp(x)")
    monkeypatch.setattr(fidelity, "compare", fused)
    equal, report = same(a, a, feeds())
    assert equal
    assert report.equal
    assert re.fullmatch(
        r"equal as written; ONNX Runtime's own fusions round differently "
        r"\(relative error 2\.0e-03\)",
        report.notes[0],
    )


def test_same_does_not_forgive_a_gross_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    original = fidelity.compare

    def broken(a: Any, b: Any, f: Feeds, *, optimize: bool = True, **options: Any) -> Any:
        return original(a, model("y = Neg(x)") if optimize else b, f, optimize=optimize, **options)

    a = model("y = Exp(x)")
    monkeypatch.setattr(fidelity, "compare", broken)
    assert not same(a, a, feeds())[0]


def test_rounding_that_the_last_layer_magnifies_is_no_difference() -> None:
    """A sigmoid far below zero turns the last bit of its input into a relative error of 1e-5."""

    def model(by: float) -> ir.Model:
        return from_text(f"""<ir_version: 8, opset_import: ["": 17]>
            g (float[4, 64] x) => (float[4, 64] y) <float by = {{{by!r}}}, float low = {{-15.0}}>
            {{ a = Mul(x, by) b = Add(a, low) y = Sigmoid(b) }}""")

    x = 3 * np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    feeds = Feeds(({"x": x},), "random", False)
    near, report = same(model(1.0), model(1.0000005), feeds)
    assert near
    assert report.equal or "no more than rounding" in report.notes[0]
    assert not same(model(1.0), model(1.01), feeds)[0], "a real difference stays one"
