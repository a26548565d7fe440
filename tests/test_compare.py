"""``effdl compare --locate`` as it is typed, and what it prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from rich.console import Console

from effdl.graph import io
from effdl.render import compare as render
from effdl.report import CompareReport, LocateReport, OutputError, TensorError, to_json
from effdl.report.plain import from_json
from tests.support import SAMPLES, Effdl

CNN = SAMPLES / "digits_cnn.onnx"


@pytest.fixture
def spoiled(tmp_path: Path) -> Path:
    """The CNN with one layer's weights a little larger."""
    model = io.load(CNN)
    conv = [n for n in model.graph if n.op_type == "Conv"][1]
    value = conv.inputs[1]
    assert value is not None
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * 1.02, name=value.name)
    path = tmp_path / "spoiled.onnx"
    io.save(model, path)
    return path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(effdl: Effdl) -> Run:
    def typed(*words: object) -> tuple[int, str, str]:
        result = effdl(*words)
        return result.code, result.out, result.err

    return typed


def test_locate_prints_the_first_tensor_and_the_worst(spoiled: Path, run: Run) -> None:
    code, out, _ = run("compare", CNN, spoiled, "--locate", "--top", 1, "--samples", 2)
    assert code == 1
    conv = [n.name for n in io.load(CNN).graph if n.op_type == "Conv"][1]
    assert f"made by Conv '{conv}'" in out
    assert "relative error 2.0e-02, largest difference" in out
    assert out.count(str(conv)) >= 2  # also in the table of what hurts
    assert "random: weak evidence" in out
    code, out, _ = run("compare", CNN, CNN, "--locate", "--samples", 1)
    assert code == 0
    assert "no tensor inside differs beyond tolerance" in out


def test_locate_as_json(spoiled: Path, run: Run) -> None:
    code, out, _ = run("compare", CNN, spoiled, "--locate", "--samples", 1, "--json")
    assert code == 1
    data = json.loads(out)
    first = data["located"]["first"]
    assert (first["op_type"], first["alone"]) == ("Conv", pytest.approx(0.02, rel=1e-3))
    assert len(data["located"]["jumps"]) == 1
    assert data["outputs"][0]["kl"] > 0
    report = from_json(CompareReport, data)
    assert report.located is not None
    assert report.located.first is not None
    assert to_json(report) == data
    plain = json.loads(run("compare", CNN, CNN, "--samples", 1, "--json")[1])
    assert plain["located"] is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([CNN, "--locate"], "--locate compares two models on this machine"),
        ([CNN, CNN, "--locate", "--target", "arm-emulated"], "--locate compares two models"),
        ([CNN, "nowhere.onnx"], "nowhere.onnx: no such file"),
        (["nowhere.onnx", CNN, "--locate"], "nowhere.onnx: no such file"),
        ([CNN, CNN, "--locate", "--top", "0"], "--top"),
    ],
)
def test_bad_words_are_one_line(words: list[object], says: str, run: Run) -> None:
    code, out, err = run("compare", *words)
    assert (code, out) == (2, "")
    assert says in err
    assert "Traceback" not in err


def output(**more: object) -> OutputError:
    figures = {"max_abs": 3.0, "mean_abs": 0.1, "rel_l2": 0.3, "cosine": 0.95, "sqnr_db": -10.1}
    rest = {"top1": 1.0, "equal": False, "tolerance": 1e-4, "kl": 0.0123}
    return OutputError(name="some/long/output_name:0", **{**figures, **rest, **more})  # type: ignore[arg-type]


def jump(**more: object) -> TensorError:
    values = {
        "tensor": "1177",
        "node": "backbone/stage1/block0/conv_with_a_long_name",
        "op_type": "BatchNormalization",
        "other": "1177_quantized",
        "other_node": "backbone/stage1/block0/other",
        "other_op": "Conv",
        "error": 0.5,
        "max_abs": 2.0,
        "tolerance": 1e-4,
        "equal": False,
        "inputs": (("images", 0.004), ("w", 0.0)),
        "alone": 0.4,
        "unrounded": 0.01,
        "effect": 0.25,
    }
    return TensorError(**{**values, **more})  # type: ignore[arg-type]


def shown(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    located: LocateReport | None,
    *outputs: OutputError,
) -> str:
    console = Console(file=sys.stdout, width=80, highlight=False, emoji=False, markup=False)
    monkeypatch.setattr(render, "out", lambda: console)
    render.print_compare(
        CompareReport("a", "b", 2, "x.npz", True, False, outputs, (), located=located)
    )
    return capsys.readouterr().out


def found(first: TensorError | None, *jumps: TensorError, **more: object) -> LocateReport:
    values = {"compared": 12, "unmatched": 3, "optimized": False, "notes": ("a note",)}
    return LocateReport("a", "b", 2, "x.npz", True, first, jumps, **{**values, **more})  # type: ignore[arg-type]


def test_everything_fits_into_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(monkeypatch, capsys, found(jump(), jump(), jump(node="", op_type="")), output())
    assert max(len(line) for line in out.splitlines()) <= 80
    for word in (
        "KL",
        "1.2e-02",
        "3 have no counterpart",
        "a note",
        "1.0e-02 before it is rounded",
    ):
        assert word in " ".join(out.split())
    assert "in the candidate by Conv 'backbone/stage1/block0/other'" in out


def test_columns_that_say_nothing_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(monkeypatch, capsys, None, output(top1=None, kl=None))
    assert "top-1" not in out
    assert "KL" not in out
    assert "inside" not in out
    out = shown(monkeypatch, capsys, found(jump(reason="its shape is [2], was [3]")), output())
    assert "its shape is [2], was [3]" in out
    assert "What hurts" not in out
    out = shown(monkeypatch, capsys, found(None, optimized=True), output())
    assert "as ONNX Runtime optimizes them" in out
