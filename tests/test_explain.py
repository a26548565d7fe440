"""``effdl explain``: what a pass finds, and why it does not find more."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest
from typer.testing import CliRunner

import effdl
from effdl.cli.app import app
from effdl.errors import ModelError, RecipeError, UsageError
from effdl.passes.base import Context
from effdl.passes.fuse.gelu import FuseGelu

SAMPLES = Path(__file__).parent.parent / "sample_models"
GELU = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[2, 4] x) => (float[2, 4] y, float[2, 4] e)
<float r = {1.4142135}, float one = {1.0}, float half = {0.5}>
{
  d = Div(x, r)
  e = Erf(d)
  a = Add(e, one)
  m = Mul(x, a)
  y = Mul(m, half)
}
"""


def test_what_fits_and_what_does_not_is_named() -> None:
    model = ir.from_onnx_text(GELU)
    report = effdl.explain(model, "fuse_gelu")
    assert report.changes == 0
    assert report.reason == "no candidate fits"
    assert "'e' is a graph output" in report.skipped[0][1]
    assert len(model.graph) == 5, "the model stays as it is"
    model.graph.outputs.pop()
    report = effdl.explain(model, "fuse_gelu", overrides=["domain=com.microsoft"])
    assert (report.changes, report.reason) == (1, "")
    assert report.options == {"domain": "com.microsoft"}
    assert len(report.touched) == 1


def test_json_has_every_node_and_the_terminal_groups_them() -> None:
    path = str(SAMPLES / "digits_cnn.onnx")
    run = CliRunner().invoke(app, ["explain", "fold_batchnorm", path, "--json"])
    assert run.exit_code == 0
    found = json.loads(run.stdout)
    assert found["changes"] == len(found["touched"]) == 9
    run = CliRunner().invoke(app, ["explain", "fold_batchnorm", path])
    assert "9 places found" in run.stdout
    assert all(len(line) <= 80 for line in run.stdout.splitlines())
    run = CliRunner().invoke(app, ["explain", "quantize_static", path])
    assert "candidate" in run.stdout


def test_a_model_without_candidates_says_so() -> None:
    report = effdl.explain(SAMPLES / "digits_mlp.onnx", "fuse_attention")
    assert report.reason == "nothing in the model is a candidate"


def test_faults_are_named() -> None:
    model = SAMPLES / "digits_mlp.onnx"
    with pytest.raises(RecipeError, match="unknown pass"):
        effdl.explain(model, "fuse_atention")
    with pytest.raises(UsageError, match="'form' of fuse_attention must be"):
        effdl.explain(model, "fuse_attention", overrides=["form=best"])


@pytest.mark.parametrize(("width", "error"), [(4, ValueError), (3, ModelError)])
def test_a_pass_that_fails_on_a_model_that_never_ran_is_no_bug(
    width: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: FuseGelu, model: ir.Model, ctx: Context) -> int:
        raise ValueError("unexpected")

    monkeypatch.setattr(FuseGelu, "run", fails)
    model = ir.from_onnx_text(
        f"""<ir_version: 8, opset_import: ["" : 17]> g (float[2, 4] x) => (float[2, m] y)
        <float[{width}] w = {{{", ".join(["1.0"] * width)}}}> {{
            four = Constant <value = int64[2] {{2, 4}}> ()
            z = Reshape (x, four)
            y = Add (z, w)
        }}"""
    )
    with pytest.raises(error, match="unexpected"):
        effdl.explain(model, "fuse_gelu")
