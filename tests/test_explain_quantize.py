"""``effdl explain quantize``: the table of layers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from effdl import api
from effdl.errors import ModelError
from effdl.graph import io
from tests.support import SAMPLES, Effdl

CNN = SAMPLES / "digits_cnn.onnx"
CALIB = SAMPLES / "digits_cnn.calib.npz"


def test_every_layer_of_a_cnn_has_its_row(effdl: Effdl) -> None:
    result = effdl(
        "explain", "quantize", str(CNN), "--data", str(CALIB), "--seconds", "0.3", "--json"
    )
    assert result.code == 0, result.err
    found = json.loads(result.out)
    convs = [n.name for n in io.load(CNN).graph if n.op_type == "Conv"]
    rows = {r["names"][0]: r for r in found["rows"]}
    assert found["form"] == "static"
    assert set(convs) <= set(rows)
    for name in convs:
        row = rows[name]
        assert row["kind"] in ("uint8 x int8", "int8 x int8")
        assert row["low"] <= 0 < row["high"]
        assert 0 < row["effect"] < 0.2
        assert row["before_ms"] > 0
        assert row["after_ms"] > 0
        assert row["decision"] in ("8-bit", "float: slower", "float: hurts")
    assert 0 < found["error"] <= found["limit"]
    # the effects of single layers make up the error of all together, taken as independent
    effects = np.hypot.reduce([r["effect"] or 0.0 for r in found["rows"]])
    assert 0.2 < effects / found["error"] < 5


def test_a_transformer_has_no_ranges_without_data(effdl: Effdl) -> None:
    model = SAMPLES / "digits_transformer.onnx"
    result = effdl("explain", "quantize", str(model), "--seconds", "0.3")
    assert result.code == 0, result.err
    assert "dynamic form" in result.out
    assert "each run" in result.out
    assert "random inputs" in result.out
    assert "min_size" in result.out  # what stays float says why


def test_a_cnn_without_data_takes_random_ones() -> None:
    found = api.explain_quantize(CNN, seconds=0.3)
    assert (found.form, found.real) == ("static", False)
    assert found.rows[0].high is not None


def test_what_it_refuses(effdl: Effdl, tmp_path: Path) -> None:
    result = effdl("explain", "quantize", str(CNN), "--target", "cuda")
    assert result.code == 2
    assert "explain quantize measures on this machine's CPU" in result.err
    with pytest.raises(ModelError, match="nothing becomes 8-bit"):
        api.explain_quantize(_quantized(tmp_path), seconds=0.3)


def _quantized(folder: Path) -> Path:
    from effdl.run_options import RunOptions

    goal = folder / "q.onnx"
    recipe = {"name": "q", "description": "q", "passes": ["quantize_static"]}
    options = RunOptions(gate="off", bench_seconds=0)
    api.optimize(CNN, recipe, goal, data=CALIB, options=options)
    return goal
