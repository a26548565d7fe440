"""The gate on real networks: one that plain int8 ruins, one that takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from effdl import gate as gate_module
from effdl.data.spec import Source
from effdl.measure import outcome
from effdl.pipeline import optimize
from effdl.recipe import load as load_recipe
from effdl.report import RunReport
from effdl.run_options import RunOptions
from tests.support import SHARED, needs_shared
from tests.test_gate import fake_bench

pytestmark = [pytest.mark.shared, needs_shared]


def quantized(model: ir.Model) -> float:
    """The stopwatch: int8 is faster. Real times are for the scripts; errors are real here."""
    return 1.5 if any(n.op_type == "QuantizeLinear" for n in model.graph) else 1.0


@pytest.fixture(autouse=True)
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = fake_bench(quantized, [])
    monkeypatch.setattr(gate_module, "bench", bench)
    monkeypatch.setattr(outcome, "bench", bench)


def run(name: str, preprocess: str, tmp_path: Path, **options: Any) -> RunReport:
    assert SHARED is not None
    data = Source(path=SHARED / "data" / "faces", preprocess=preprocess)
    recipe = load_recipe("cnn-int8")
    model = SHARED / "models" / name
    goal = tmp_path / "o.onnx"
    return optimize(model, recipe, goal, data=data, options=RunOptions(**options))


def test_yolox_is_repaired_and_the_layers_are_named(tmp_path: Path) -> None:
    report = run("yolox_nano.onnx", "raw,color=BGR,resize=letterbox", tmp_path)
    step = next(p for p in report.passes if p.name == "quantize_static")
    assert report.won
    assert step.status == "changed"
    assert "allowed 0.2" in step.reason  # what plain int8 would have done
    assert "Mul_43" in step.reason
    assert {"Conv_41", "Mul_43"} & set(step.options["ignore"])
    assert report.verified is not None
    assert max(o.rel_l2 for o in report.verified.outputs) <= 0.2


def test_mobilenet_is_accepted(tmp_path: Path) -> None:
    """As it is, or without a few layers that are slower in 8 bits on this machine."""
    report = run("mobilenetv2_fp32_from_qdq.onnx", "imagenet,size=244", tmp_path)
    step = next(p for p in report.passes if p.name == "quantize_static")
    assert report.won
    assert step.status == "changed"
    assert len(step.options.get("ignore", ())) < 20
    assert step.gate is not None
    assert step.gate.fidelity is not None
    assert step.gate.fidelity < 0.2
