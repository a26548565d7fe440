"""scripts/compare_simplifiers.py: counting, summing up, and that a job that hangs or dies ends."""

import os
import time
from pathlib import Path
from types import ModuleType

import onnx
import pytest

from tests.support import ROOT, SAMPLES


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import compare_simplifiers

    return compare_simplifiers


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import simplifier_tools

    return simplifier_tools


def test_nodes_of_all_graphs_count_but_constants(script: ModuleType) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (bool c, float[2] x) => (float[2] y) {
            k = Constant<value = float[2] {1,2}>()
            y = If(c) <then_branch = a () => (float[2] p) { p = Add(x, k) },
                       else_branch = b () => (float[2] q) { h = Relu(x) q = Neg(h) }>
        }"""
    )
    assert script.count_nodes(model) == 4


def rows(script: ModuleType) -> list:
    def row(name: str, **nodes: int | None) -> object:
        results = {t: script.Result(nodes=n, bytes=10, seconds=1.0) for t, n in nodes.items()}
        for result in results.values():
            result.failed = "" if result.nodes is not None else "signal 11"
        return script.Row(name, "g", 20, 100, results)

    first = row("one", effdl=10, onnxslim=8, onnxsim=None)
    first.results["onnxslim"].wrong = "relative error 0.9"
    return [first, row("two", effdl=11, onnxslim=10, onnxsim=12)]


def test_wrong_results_are_no_measure_for_others(script: ModuleType) -> None:
    one, two = rows(script)
    assert one.best() == 10
    assert one.excess() == 0
    assert two.excess() == pytest.approx(0.1)
    assert one.excess("onnxslim") is None


def test_totals(script: ModuleType) -> None:
    sums = script.totals(rows(script), "effdl")
    assert (sums.models, sums.fewest, sums.near, sums.worst_at) == (2, 1, 1, "two")
    assert script.totals(rows(script), "onnxslim").wrong == 1
    assert script.totals(rows(script), "onnxsim").failed == 1
    assert sums.bytes == 10  # only where every tool has a file


def test_the_table_fits_a_terminal(script: ModuleType) -> None:
    text = script.table(rows(script), ("effdl", "onnxslim", "onnxsim"))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "8 wrong" in text
    assert "crash" in text


def test_a_job_that_hangs_or_dies_ends(tools: ModuleType) -> None:
    assert tools.in_fork(lambda job: {"x": 1}, {}, 10.0)["x"] == 1
    assert "not done" in tools.in_fork(lambda job: time.sleep(60) or {}, {}, 0.2)["failed"]
    assert "signal 9" in tools.in_fork(lambda job: os.kill(os.getpid(), 9), {}, 10.0)["failed"]
    assert "ValueError" in tools.in_fork(lambda job: {"x": int("no")}, {}, 10.0)["failed"]


def test_files_are_found_once(script: ModuleType, tmp_path: Path) -> None:
    data = (SAMPLES / "digits_mlp.onnx").read_bytes()
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(data)
    assert [p.name for p in script.find_models([tmp_path])] == ["a.onnx"]


def test_effdl_simplifies_a_file(tools: ModuleType, tmp_path: Path) -> None:
    work, _ = tools.tool("effdl")
    out = tmp_path / "out.onnx"
    work({"model": str(SAMPLES / "digits_mlp.onnx"), "out": str(out)})
    assert out.is_file()
