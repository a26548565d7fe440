"""A bench against an earlier one, and when continuous integration fails."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from effdl.errors import DataError, UsageError
from effdl.measure.baseline import read_baseline, setting, too_slow, with_baseline
from effdl.report import (
    BenchReport,
    BenchResult,
    BenchScan,
    Latency,
    Yardstick,
    to_json,
)

LATENCY = Latency(1.0, 1.1, 1.2, 0.9, 1.0, 0.02, 1000)
HERE = Path("base.json")


def model(
    name: str, ratio: float = 1.0, width: float = 0.01, verdict: str = "same", sha: str = ""
) -> BenchResult:
    ci = (ratio * (1 - width), ratio * (1 + width))
    return BenchResult(
        f"models/{name}", sha or name, 1, 1, 5.0, 2.0, 1, LATENCY, ratio, ci, verdict, 0.02, 40
    )


def report(*models: BenchResult, yard: float | None = None, **changes: object) -> BenchReport:
    plain = BenchReport(
        provider="CPUExecutionProvider",
        threads=1,
        onnxruntime="1.31.1",
        cpu="Some CPU",
        feeds={"x": "float32[1,4]"},
        source="random",
        models=models,
        verdict=tuple("" for _ in models[1:]),
        min_effect=0.02,
        yardstick=None if yard is None else Yardstick(1.0, yard, (yard * 0.99, yard * 1.01)),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


BASE = model("base.onnx", verdict="reference")


def test_the_same_ratio_is_no_change() -> None:
    then = report(BASE, model("cand.onnx", 1.5))
    now = report(BASE, model("cand.onnx", 1.505))
    found = with_baseline(now, [then], HERE).baseline
    assert found is not None
    assert (found.by, found.notes) == ("ratio", ())
    assert [c.verdict for c in found.changes] == ["same"]
    assert "no difference above the noise floor" in found.changes[0].sentence


def test_a_lower_ratio_is_slower_than_then() -> None:
    then = report(BASE, model("a.onnx", 1.2), model("cand.onnx", 1.5))
    now = report(BASE, model("cand.onnx", 1.35))
    found = with_baseline(now, [then], HERE).baseline
    assert found is not None
    change = found.changes[0]
    assert change.verdict == "slower"
    assert change.ratio == pytest.approx(0.9)
    assert change.ci[0] < 0.9 < change.ci[1] < 1
    assert change.then == "models/cand.onnx"


def test_the_uncertainty_of_both_days_counts() -> None:
    then = report(BASE, model("cand.onnx", 1.5, width=0.05))
    now = report(BASE, model("cand.onnx", 1.4, width=0.05))
    found = with_baseline(now, [then], HERE).baseline
    assert found is not None
    assert found.changes[0].verdict == "noisy"


def test_a_renamed_candidate_is_found_by_its_place() -> None:
    then = report(BASE, model("old.onnx", 1.5))
    found = with_baseline(report(BASE, model("new.onnx", 1.5)), [then], HERE).baseline
    assert found is not None
    assert found.changes[0].then == "models/old.onnx"
    three = report(BASE, model("a.onnx"), model("b.onnx"))
    with pytest.raises(DataError, match=r"no model 'new.onnx'"):
        with_baseline(report(BASE, model("new.onnx")), [three], HERE)


def test_a_slower_machine_is_no_slower_model() -> None:
    """Model and yardstick take twice as long today."""
    then = report(BASE, yard=3.0)
    found = with_baseline(report(BASE, yard=3.03), [then], HERE).baseline
    assert found is not None
    assert found.by == "latency"
    assert found.changes[0].verdict == "same"


def test_a_slower_model_is_told_by_the_yardstick() -> None:
    then, now = report(BASE, yard=3.0), report(BASE, yard=3.45)
    found = with_baseline(now, [then], HERE).baseline
    assert found is not None
    assert found.changes[0].verdict == "slower"
    assert found.changes[0].ratio == pytest.approx(1 / 1.15)
    # What a yardstick cannot tell.
    near = with_baseline(report(BASE, yard=3.08), [then], HERE).baseline
    assert near is not None
    assert near.changes[0].verdict == "same"


def test_no_yardstick_no_comparison() -> None:
    with pytest.raises(DataError, match="no yardstick"):
        with_baseline(report(BASE, yard=1.0), [report(BASE)], HERE)


def test_another_processor() -> None:
    """Ratios are compared with a warning, latencies are not."""
    then = report(BASE, model("cand.onnx", 1.5), cpu="Other CPU")
    found = with_baseline(report(BASE, model("cand.onnx", 1.5)), [then], HERE).baseline
    assert found is not None
    assert len(found.changes) == 1
    assert "another processor: Other CPU then, Some CPU now" in found.notes[0]
    alone = with_baseline(report(BASE, yard=1.0), [report(BASE, yard=1.0, cpu="X")], HERE)
    assert alone.baseline is not None
    assert alone.baseline.changes == ()
    assert "nothing was judged" in alone.baseline.notes[1]
    failed, doubtful = too_slow(alone, 0.05)
    assert failed == []
    assert "does not fail" in doubtful[0]


def test_another_onnxruntime_is_noted() -> None:
    then = report(BASE, model("cand.onnx"), onnxruntime="1.30.0")
    found = with_baseline(report(BASE, model("cand.onnx")), [then], HERE).baseline
    assert found is not None
    assert "another ONNX Runtime: 1.30.0 then, 1.31.1 now" in found.notes[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"threads": 2}, "2 threads, now 1 thread"),
        ({"threads": 0}, "all threads, now 1 thread"),
        ({"feeds": {"x": "float32[8,4]"}}, r"inputs x float32\[8,4\], now x float32\[1,4\]"),
        ({"provider": "CUDAExecutionProvider", "target": "cuda"}, "now CPUExecutionProvider"),
        ({"models": (model("base.onnx", sha="other"), model("c.onnx"))}, "another base model"),
        ({"models": (BASE,)}, "a single model"),
    ],
)
def test_what_is_no_baseline_for_this(changes: dict[str, object], says: str) -> None:
    then = replace(report(BASE, model("c.onnx")), **changes)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=says) as e:
        with_baseline(report(BASE, model("c.onnx")), [then], HERE)
    assert e.value.where == "base.json"
    assert e.value.exit_code == 2


def test_the_cell_of_a_scan_that_is_alike_is_taken() -> None:
    cells = [report(BASE, model("c.onnx", 1.1 * n), threads=n) for n in (1, 2, 4)]
    found = with_baseline(report(BASE, model("c.onnx", 2.2), threads=2), cells, HERE).baseline
    assert found is not None
    assert found.changes[0].ratio == pytest.approx(1.0)
    with pytest.raises(DataError, match="none of its 3 cells"):
        with_baseline(report(BASE, model("c.onnx"), threads=8), cells, HERE)


def test_reports_are_read_back(tmp_path: Path) -> None:
    one = report(BASE, model("c.onnx", 1.5), yard=2.0)
    path = tmp_path / "one.json"
    path.write_text(json.dumps(to_json(one)))
    assert read_baseline(path) == (one,)
    scan = BenchScan({"threads": (1, 2)}, (one, replace(one, threads=2)))
    path.write_text(json.dumps(to_json(scan)))
    assert read_baseline(path) == scan.cells


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "no JSON"),
        ("[]", "no report of effdl"),
        ("{}", "no report of effdl"),
        ('{"schema": 1}', "schema 1"),
        ('{"schema": 2, "models": []}', "missing"),
    ],
)
def test_what_is_no_report(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises((DataError, UsageError), match=says) as e:
        read_baseline(path)
    assert "--export-json" in e.value.hint
    with pytest.raises(DataError, match="No such file"):
        read_baseline(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("ratio", "width", "verdict", "failed", "doubtful"),
    [
        (0.93, 0.01, "slower", 1, 0),  # 7.5 % slower
        (0.97, 0.01, "slower", 0, 0),  # 3.1 % slower: allowed
        (1.0, 0.01, "same", 0, 0),
        (1.4, 0.01, "faster", 0, 0),
        (0.97, 0.08, "noisy", 0, 1),
        (1.2, 0.05, "noisy", 0, 0),  # too noisy, but surely not slower
    ],
)
def test_too_slow(ratio: float, width: float, verdict: str, failed: int, doubtful: int) -> None:
    found = too_slow(report(BASE, model("cand.onnx", ratio, width, verdict)), 0.05)
    assert [len(f) for f in found] == [failed, doubtful]
    if failed:
        assert found[0][0].startswith("cand.onnx is 7.5% slower than base.onnx, more than the 5%")


def test_with_a_baseline_the_model_is_judged_by_what_it_was() -> None:
    """The candidate is slower than the base, but no slower than last week."""
    slow = model("cand.onnx", 0.7, verdict="slower")
    report_now = report(BASE, slow)
    assert too_slow(report_now, 0.05)[0]
    assert too_slow(with_baseline(report_now, [report(BASE, slow)], HERE), 0.05) == ([], [])
    worse = with_baseline(report_now, [report(BASE, model("cand.onnx", 0.8))], HERE)
    assert "slower than the baseline" in too_slow(worse, 0.05)[0][0]


def test_cells_of_a_scan_are_named() -> None:
    slow = model("cand.onnx", 0.7, verdict="slower")
    cells = (
        report(BASE, model("cand.onnx"), threads=1, dims={"batch": 1}),
        report(BASE, slow, threads=2, dims={"batch": 8}),
    )
    failed, _ = too_slow(BenchScan({"threads": (1, 2)}, cells), 0.05)
    assert len(failed) == 1
    assert failed[0].startswith("cand.onnx (2 threads, batch=8) is 42.9% slower than base.onnx")
    assert setting(replace(cells[0], threads=0, dims={})) == "all threads"
